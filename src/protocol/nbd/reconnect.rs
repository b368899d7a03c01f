//! Making a lost connection again.

use std::time::Duration;

use nix::errno::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::nbd::{Terms, TransmissionFlags};
use crate::runtime::Handle;

use super::NbdOptions;
use super::link::{Link, Phase, unreachable_server};
use super::stream::Stream;

/// How long an attempt to connect and to shake hands may take.
pub(super) const ATTEMPT: Duration = Duration::from_secs(10);
/// Shortest and longest pause between attempts.
pub(super) const PAUSES: (Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(5));

impl Link {
    pub(super) fn lose_connection(&self) {
        let now = self.handle.now();
        let lasted = now.saturating_since(self.heard.get()) > ATTEMPT;
        if self.lost_at.get().is_none() || lasted {
            self.lost_at.set(Some(now));
            self.next_attempt.set(now);
        }
        self.ledger.borrow_mut().connection_lost();
        if self.options.reconnect_delay.is_zero() || self.hurried.get() > 0 {
            self.give_up();
        }
    }

    /// Until there is a connection; none where the node is closed.
    pub(super) async fn reconnect(&self) -> Option<Stream> {
        loop {
            let deadline = self.lost_at.get()? + self.options.reconnect_delay;
            let limit = match &*self.phase.borrow() {
                Phase::Closed => return None,
                Phase::Waiting => Some(deadline.saturating_since(self.handle.now())),
                _ if self.ledger.borrow().is_empty() => None,
                _ => Some(ATTEMPT),
            };
            let Some(limit) = limit else {
                self.attention.notified().await;
                continue;
            };
            if limit.is_zero() {
                self.give_up();
                continue;
            }
            let pause = self.next_attempt.get().saturating_since(self.handle.now());
            if !pause.is_zero() {
                // Cut short by what changes the phase.
                let pause = pause.min(limit);
                let _ = self.handle.timeout(pause, self.attention.notified()).await;
                continue;
            }
            match self.connect_again(limit.min(ATTEMPT)).await {
                Ok(stream) => return Some(stream),
                Err(error) => self.note_failed_attempt(&error),
            }
        }
    }

    fn note_failed_attempt(&self, error: &Error) {
        tracing::debug!(%error, "NBD server cannot be reached");
        let pause = self.pause.get();
        self.next_attempt.set(self.handle.now() + pause);
        self.pause.set((pause * 2).min(PAUSES.1));
        if matches!(&*self.phase.borrow(), Phase::Down) {
            self.give_up();
        }
    }

    async fn connect_again(&self, limit: Duration) -> Result<Stream> {
        let (stream, terms) = attempt(&self.handle, &self.options, limit).await?;
        check_same(&self.terms, &terms)?;
        if self.is_closed() {
            return Err(unreachable_server());
        }
        let pause = self.pause.get();
        self.next_attempt.set(self.handle.now() + pause);
        self.pause.set((pause * 2).min(PAUSES.1));
        let mut ledger = self.ledger.borrow_mut();
        ledger.set_terms(terms.mode, terms.allocation);
        // What waits is answered in the new terms.
        ledger.connection_lost();
        self.phase.replace(Phase::Connected(stream.clone()));
        self.heard.set(self.handle.now());
        tracing::info!("connection to an NBD server is back");
        Ok(stream)
    }
}

/// One attempt to connect.
pub(super) async fn attempt(
    handle: &Handle,
    options: &NbdOptions,
    limit: Duration,
) -> Result<(Stream, Terms)> {
    let opening = Stream::open(handle, &options.address, &options.export);
    match handle.timeout(limit, opening).await {
        Ok(opened) => opened,
        Err(_) => {
            let message = "The NBD server takes too long to answer";
            Err(Error::from_errno(Errno::ETIMEDOUT, message))
        }
    }
}

/// The export is what it was.
fn check_same(before: &Terms, now: &Terms) -> Result<()> {
    use TransmissionFlags as F;
    let needed = before.flags - F::HAS_FLAGS - F::READ_ONLY - F::CAN_MULTI_CONN - F::SEND_CACHE;
    let same = before.size == now.size
        && before.blocks == now.blocks
        && now.flags.contains(needed - F::SEND_DF)
        && before.flags.contains(F::READ_ONLY) == now.flags.contains(F::READ_ONLY)
        && before.allocation.is_some() == now.allocation.is_some();
    match same {
        true => Ok(()),
        false => {
            let message = "The export of the NBD server is another one than before";
            Err(Error::new(ErrorKind::Unsupported, message))
        }
    }
}
