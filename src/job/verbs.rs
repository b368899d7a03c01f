//! What users ask of a job.

use super::control::{Cancelled, Job};
use super::{IoStatus, Status, Verb};
use crate::error::{Error, Result};
use crate::filter::CopyMode;

impl Job {
    /// `set-speed`: bytes a second, 0 is no limit.
    ///
    /// # Errors
    /// Negative, or the state does not allow it; in QEMU's words.
    pub fn set_speed(&self, speed: i64) -> Result<()> {
        Verb::SetSpeed.check(self.id(), self.status())?;
        self.limit_speed(speed)
    }

    pub(super) fn limit_speed(&self, speed: i64) -> Result<()> {
        let Ok(speed) = u64::try_from(speed) else {
            return Err(Error::refused(
                "Parameter 'speed' expects a non-negative value",
            ));
        };
        self.limit.set_speed(speed, self.handle().now());
        self.changed.notify_all();
        Ok(())
    }

    /// `pause`: no new piece of work begins. The state tells when those in flight have ended.
    ///
    /// # Errors
    /// It is paused, or the state does not allow it.
    pub fn pause(&self) -> Result<()> {
        Verb::Pause.check(self.id(), self.status())?;
        if self.paused.get() {
            return Err(Error::refused("Job is already paused"));
        }
        self.stop_for_a_while();
        Ok(())
    }

    /// `resume`: goes on, also after an error.
    ///
    /// # Errors
    /// It is not paused, or the state does not allow it.
    pub fn resume(&self) -> Result<()> {
        // In QEMU's order.
        if !self.paused.get() {
            return Err(Error::refused("Can't resume a job that was not paused"));
        }
        Verb::Resume.check(self.id(), self.status())?;
        self.go_on();
        Ok(())
    }

    /// `complete`: leaves the ready state with success.
    ///
    /// # Errors
    /// The state does not allow it, or the job is being cancelled.
    pub fn complete(&self) -> Result<()> {
        Verb::Complete.check(self.id(), self.status())?;
        if self.cancelled.get() != Cancelled::No {
            let message = format!("The active block job '{}' cannot be completed", self.id());
            return Err(Error::refused(message));
        }
        self.completing.set(true);
        self.changed.notify_all();
        Ok(())
    }

    /// `cancel`. Without `force` a job that is ready and can do so ends well, without its last step. Too
    /// late for a job that takes its last step: it ends as that does.
    ///
    /// # Errors
    /// The state does not allow it; paused by its user and not forced.
    pub fn cancel(&self, force: bool) -> Result<()> {
        Verb::Cancel.check(self.id(), self.status())?;
        if self.paused.get() && !force {
            let message = format!(
                "The block job for device '{}' is currently paused",
                self.id()
            );
            return Err(Error::refused(message));
        }
        if self.deciding.get() {
            return Ok(());
        }
        let softly = !force && self.ends_well.get() && self.status().is_ready();
        if softly && self.cancelled.get() == Cancelled::No {
            self.cancelled.set(Cancelled::Softly);
        } else if !softly {
            self.cancelled.set(Cancelled::Hard);
        }
        if self.paused.get() {
            self.go_on();
        }
        self.changed.notify_all();
        Ok(())
    }

    /// `change` of what happens to a guest's writes while a job follows them.
    ///
    /// # Errors
    /// The job does not follow the guest or cannot go back, or the state does not allow it.
    pub fn change_copy_mode(&self, mode: CopyMode) -> Result<()> {
        Verb::Change.check(self.id(), self.status())?;
        match self.work() {
            Some(work) => work.change_copy_mode(mode),
            None => Err(Error::refused("Job type does not support change")),
        }
    }

    /// `finalize`: takes the last steps.
    ///
    /// # Errors
    /// It is not pending.
    pub fn finalize(&self) -> Result<()> {
        Verb::Finalize.check(self.id(), self.status())?;
        self.finalizing.set(true);
        self.changed.notify_all();
        self.wake_group();
        Ok(())
    }

    pub(super) fn stop_for_a_while(&self) {
        self.paused.set(true);
        self.settle();
    }

    pub(super) fn go_on(&self) {
        self.paused.set(false);
        self.io_status.set(IoStatus::Ok);
        match self.status() {
            Status::Paused => self.enter(Status::Running),
            Status::Standby => self.enter(Status::Ready),
            _ => {}
        }
        self.changed.notify_all();
    }

    /// A pause that was asked for holds once no piece is in flight.
    pub(super) fn settle(&self) {
        if self.paused.get() && self.pieces.get() == 0 {
            match self.status() {
                Status::Running => self.enter(Status::Paused),
                Status::Ready => self.enter(Status::Standby),
                _ => {}
            }
        }
    }
}
