//! Bugs that were found, each with its story.

use std::rc::Rc;
use std::time::Duration;

use liveblk::buffer::MemorySlice;
use liveblk::filter::CopyMode;
use liveblk::job::{ErrorPolicy, Job, Status, SyncMode};
use liveblk::runtime::Handle;
use liveblk::testing::{DiskOperation, DiskOptions, Fault, Power, simulate};
use nix::errno::Errno;

use super::plan::{Chain, MIRRORS, Plan, copied, options, start, whole};
use super::stage::{Kind, Stage, World};
use crate::chain::Geometry;

fn qcow2() -> Kind {
    Kind::Qcow2(Geometry {
        version: 3,
        cluster_bits: 12,
        refcount_bits: 16,
        lazy_refcounts: false,
        tiny_caches: false,
        pass_discard: true,
    })
}

/// A filled chain of layers of these sizes, the base first, and what its active layer shows.
pub(crate) async fn staged(handle: &Handle, seed: u64, sizes: &[u64]) -> (Stage, Vec<u8>) {
    let world = World {
        handle: handle.clone(),
        power: Power::new(),
        disk: DiskOptions::default(),
        seed,
    };
    let chain = Chain {
        kinds: sizes.iter().map(|_| qcow2()).collect(),
        sizes: sizes.to_vec(),
        requests: 60,
        compresses: false,
    };
    let (stored, content) = chain.build(&world).await;
    let active = stored[stored.len() - 1].name.clone();
    let stage = Stage::open(&world, stored, &active).await;
    (stage.expect("it was closed"), content)
}

const MIB: u64 = 1 << 20;

async fn begin(stage: &Stage, plan: Plan, id: &str) -> Rc<Job> {
    let started = start(stage, plan, options(id), ErrorPolicy::Report).await;
    started.expect("nothing is in the way")
}

async fn succeeds(job: &Job) {
    job.until_over().await;
    assert_eq!(job.error(), None, "job '{}'", job.id());
}

/// A commit of layers between was cancelled. Its edge for writes to the base was given back after its filter
/// was taken out, which was refused for it: the filter stayed, and the base stayed writable.
#[test]
fn a_cancelled_commit_takes_its_filter_along() {
    simulate(1, |handle| async move {
        let (stage, content) = staged(&handle, 1, &[MIB; 4]).await;
        let before = stage.picture();
        let job = begin(&stage, Plan::Commit { top: 1, base: 3 }, "j").await;
        handle.sleep(Duration::from_micros(300)).await;
        stage
            .workshop
            .jobs
            .cancel(&job, true)
            .await
            .expect("it runs");
        assert_eq!(job.error().as_deref(), Some("Operation canceled"));
        assert_eq!(stage.picture(), before);
        assert!(whole(&stage).await.expect("no fault") == content);
    });
}

/// A stream ended while a commit ran below its base: it linked its node past the commit's filter to a layer
/// that the commit keeps readers off, was refused, and failed with its header rewritten. Where the commit
/// ended first, the stream went on to look for a base that was no more, and linked to a closed node.
#[test]
fn a_stream_ends_above_a_commit() {
    for (stream_first, seed) in [(true, 1), (false, 2), (true, 3), (false, 4)] {
        simulate(seed, |handle| async move {
            let (stage, content) = staged(&handle, seed, &[MIB; 6]).await;
            let stream = Plan::Stream {
                device: 1,
                base: Some(3),
            };
            let stream = begin(&stage, stream, "stream").await;
            let commit = begin(&stage, Plan::Commit { top: 3, base: 4 }, "commit").await;
            let (first, last) = match stream_first {
                true => (stream, commit),
                false => (commit, stream),
            };
            last.set_speed(1 << 16).expect("it runs");
            succeeds(&first).await;
            assert!(!last.status().is_over(), "they ran together");
            last.set_speed(0).expect("it runs");
            succeeds(&last).await;
            stage.assert_at_rest("after both");
            assert_eq!(stage.names(), ["layer5", "layer4", "layer1", "layer0"]);
            assert!(whole(&stage).await.expect("no fault") == content);
        });
    }
}

/// A layer shorter than its overlay was committed into a base longer than itself: beyond its end the overlay
/// had shown zeroes, and showed the base's old bytes afterwards.
#[test]
fn a_longer_base_does_not_come_to_light() {
    for seed in 1..=4 {
        simulate(seed, |handle| async move {
            let (stage, content) = staged(&handle, seed, &[MIB, MIB / 2, MIB]).await;
            let job = begin(&stage, Plan::Commit { top: 1, base: 2 }, "j").await;
            succeeds(&job).await;
            stage.assert_at_rest("after the commit");
            assert!(whole(&stage).await.expect("no fault") == content);
        });
    }
}

/// A layer shorter than its overlay was streamed, over a longer base. Zeroes beyond its end were left out of the
/// overlay, as they read as zeroes anyway; with the longer base below they did not.
#[test]
fn zeroes_beyond_a_short_layer_are_streamed() {
    for seed in 1..=4 {
        simulate(seed, |handle| async move {
            let sizes = [MIB, MIB / 2, MIB - 512, MIB];
            let (stage, content) = staged(&handle, seed, &sizes).await;
            let plan = Plan::Stream {
                device: 1,
                base: Some(3),
            };
            succeeds(&*begin(&stage, plan, "j").await).await;
            stage.assert_at_rest("after the stream");
            assert!(whole(&stage).await.expect("no fault") == content);
        });
    }
}

/// A cancel came while the job took its last step: the base had become the active layer, but clients were
/// told that the job was cancelled, and would have opened the old active layer the next time.
#[test]
fn a_cancel_during_the_last_step_comes_too_late() {
    let mut late = 0;
    for micros in (0..3000).step_by(50) {
        simulate(7, |handle| async move {
            let (stage, content) = staged(&handle, 7, &[MIB, MIB]).await;
            let job = begin(&stage, Plan::Commit { top: 0, base: 1 }, "j").await;
            while job.status() != Status::Ready {
                handle.sleep(Duration::from_micros(100)).await;
            }
            job.complete().expect("it is ready");
            handle.sleep(Duration::from_micros(micros)).await;
            let pending = job.status() == Status::Pending;
            let _ = job.cancel(true);
            job.until_over().await;
            let pivoted = stage.names() == ["layer0"];
            assert_eq!(
                job.error().is_none(),
                pivoted,
                "after {micros} microseconds"
            );
            assert!(whole(&stage).await.expect("no fault") == content);
            pending && pivoted
        })
        .then(|| late += 1);
    }
    assert!(late > 0, "no cancel met the last step");
}

/// The device of a commit was a snapshot's overlay, which only an export used. The export was deleted while the
/// job ran: with the job's last edge the chain was closed, its filter too, and taking that out again ended
/// the daemon.
#[test]
fn a_job_outlives_the_export_it_worked_for() {
    let plans = [
        Plan::Commit { top: 1, base: 2 },
        Plan::Commit { top: 0, base: 2 },
        Plan::Stream {
            device: 0,
            base: None,
        },
        Plan::Stream {
            device: 1,
            base: None,
        },
    ];
    for (plan, cancelled) in plans
        .into_iter()
        .flat_map(|plan| [(plan, false), (plan, true)])
    {
        simulate(3, |handle| async move {
            let (stage, _) = staged(&handle, 3, &[MIB; 3]).await;
            let job = begin(&stage, plan, "j").await;
            handle.sleep(Duration::from_micros(200)).await;
            stage.close().await.expect("no fault");
            if plan.follows() && !cancelled {
                while job.status() != Status::Ready {
                    handle.sleep(Duration::from_micros(100)).await;
                }
                job.complete().expect("it is ready");
            }
            if cancelled {
                let _ = job.cancel(true);
            }
            job.until_over().await;
            let left: Vec<_> = stage.graph.nodes();
            assert!(left.is_empty(), "{plan:?}, cancelled {cancelled}: {left:?}");
            stage.assert_sound(false, "after the job").await;
        });
    }
}

/// A job that follows the guest was paused while its last piece was in flight. It found nothing more to copy while
/// it was paused, did not become ready for that, and when it was resumed nobody looked again: it ran for ever.
#[test]
fn a_pause_beside_the_last_piece_does_not_keep_a_job_from_being_ready() {
    for plan in [MIRRORS[0], Plan::Commit { top: 0, base: 1 }] {
        for delay in (0..1500).step_by(25) {
            simulate(9, |handle| async move {
                let (stage, _) = staged(&handle, 9, &[32 << 10; 2]).await;
                let job = begin(&stage, plan, "j").await;
                handle.sleep(Duration::from_micros(delay)).await;
                job.pause().expect("it runs, or is ready");
                handle.sleep(Duration::from_millis(10)).await;
                job.resume().expect("it is paused");
                handle.sleep(Duration::from_secs(1)).await;
                assert_eq!(job.status(), Status::Ready, "{plan:?}, {delay}");
                job.complete().expect("it is ready");
                succeeds(&job).await;
            });
        }
    }
}

const OVERLAY: Plan = copied(SyncMode::None, CopyMode::Background);

/// A mirror with `sync=none` was told as failed where its old disk could not be turned read-only, although the
/// device had moved to the target already: a client would have gone on with the old one.
#[test]
fn an_old_disk_that_stays_writable_is_no_failure() {
    simulate(21, |handle| async move {
        let (stage, content) = staged(&handle, 21, &[MIB, MIB]).await;
        let old = stage.active();
        let job = begin(&stage, OVERLAY, "j").await;
        lead(&stage, &job, Status::Ready).await;
        *stage.access.refused.borrow_mut() = Some(old.name().to_owned());
        job.complete().expect("it is ready");
        succeeds(&job).await;
        assert_eq!(stage.active().name(), "copy0");
        assert!(!old.options().read_only);
        assert!(whole(&stage).await.expect("no fault") == content);
    });
}

/// The same mirror moved the device before what the guest had written to the old disk was durable. Flushes go
/// to the target alone from then on.
#[test]
fn an_old_disk_that_cannot_be_flushed_stays_the_device() {
    simulate(22, |handle| async move {
        let (stage, content) = staged(&handle, 22, &[MIB, MIB]).await;
        let old = stage.active();
        let job = begin(&stage, OVERLAY, "j").await;
        lead(&stage, &job, Status::Ready).await;
        let bytes = MemorySlice::from_bytes(&content[..4096]);
        let written = stage.guest.write(0, bytes.into(), Default::default());
        written.await.expect("no fault");
        let disk = stage.disk(old.name());
        disk.fail(Fault::once(&[DiskOperation::Flush], 0, Errno::EIO));
        job.complete().expect("it is ready");
        job.until_over().await;
        assert!(job.error().is_some());
        assert_eq!(stage.active().name(), old.name());
        assert!(whole(&stage).await.expect("no fault") == content);
        disk.heal();
        stage.assert_in_order("after the fault");
    });
}

async fn lead(stage: &Stage, job: &Job, status: Status) {
    while job.status() != status {
        stage.world.handle.sleep(Duration::from_micros(100)).await;
    }
}
