//! What a mirror promises: the target is the device at one instant, or follows it; nothing is lost, written twice
//! or left behind.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use liveblk::block::{Child, Node, Permission, Permissions};
use liveblk::buffer::MemorySlice;
use liveblk::error::ErrorKind;
use liveblk::filter::CopyMode;
use liveblk::job::{Before, ErrorPolicy, Job, Mirror, Status, SyncMode, mirror};
use liveblk::range::ByteRange;
use liveblk::runtime::Handle;
use liveblk::testing::{Random, for_each_seed, simulate};

use super::plan::{MIRRORS, Plan, copied, mirror_of, options, start, start_named, whole};
use super::regressions::staged;
use super::stage::{Kind, Stage};

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

async fn begin(stage: &Stage, plan: Plan) -> Rc<Job> {
    let started = start(stage, plan, options("j"), ErrorPolicy::Report).await;
    started.expect("nothing is in the way")
}

async fn until(stage: &Stage, job: &Job, status: Status) {
    for _ in 0..100_000 {
        if job.status() == status {
            return;
        }
        stage.world.handle.sleep(Duration::from_micros(100)).await;
    }
    panic!("{:?} never becomes {status:?}", job.status());
}

/// Everything that is read through an image that nobody has open.
async fn content_of(stage: &Stage, name: &str) -> Vec<u8> {
    let alone = Stage::open(&stage.world, stage.stored(), name).await;
    let alone = alone.expect("it was closed");
    whole(&alone).await.expect("no fault")
}

/// A guest that writes numbers, one after the other, each to another place than the one before.
struct Counter {
    guest: Rc<Child>,
    answered: Cell<u32>,
    stopped: Cell<bool>,
}

/// Places of a counter, apart from each other.
const PLACES: u32 = 61;
const APART: u64 = MIB / PLACES as u64 / SECTOR * SECTOR;

impl Counter {
    fn start(handle: &Handle, stage: &Stage) -> (Rc<Counter>, impl Future<Output = ()> + use<>) {
        let counter = Rc::new(Counter {
            guest: stage.guest.clone(),
            answered: Cell::new(0),
            stopped: Cell::new(false),
        });
        let (writer, handle) = (counter.clone(), handle.clone());
        let writing = async move {
            while !writer.stopped.get() {
                writer.write_next().await;
                handle.sleep(Duration::from_micros(20)).await;
            }
        };
        (counter, writing)
    }

    async fn write_next(&self) {
        let number = self.answered.get() + 1;
        let bytes = number.to_le_bytes().repeat((SECTOR / 4) as usize);
        let buffer = MemorySlice::from_bytes(&bytes);
        let written = self
            .guest
            .write(place(number), buffer.into(), Default::default());
        written.await.expect("no fault");
        self.answered.set(number);
    }
}

fn place(number: u32) -> u64 {
    u64::from(number % PLACES) * APART
}

/// How many writes of a counter an image holds: all up to some number, and none after it.
fn count(bytes: &[u8], at_least: u32, at_most: u32) -> Result<u32, String> {
    let number_at = |index: u32| {
        let start = place(index) as usize;
        u32::from_le_bytes(bytes[start..start + 4].try_into().expect("four bytes"))
    };
    let known = |number: u32| number <= at_most;
    let last = (0..PLACES).map(number_at).filter(|n| known(*n)).max();
    let last = last.unwrap_or(0);
    for number in last.saturating_sub(PLACES - 1).max(1)..=last {
        let found = number_at(number % PLACES);
        if found != number {
            return Err(format!("{last} is there, but {found} instead of {number}"));
        }
    }
    match (at_least..=at_most).contains(&last) {
        true => Ok(last),
        false => Err(format!("{last} is not within {at_least}..={at_most}")),
    }
}

/// Writes are made one after the other while the job is cancelled: the target holds all up to one of them, and
/// nothing that was begun after the cancel was answered.
#[test]
fn a_cancelled_mirror_is_the_device_at_one_instant() {
    for_each_seed("a_cancelled_mirror", 12, |seed| {
        simulate(seed, |handle| async move {
            let mode = [CopyMode::Background, CopyMode::WriteBlocking][seed as usize % 2];
            let (stage, _) = staged(&handle, seed, &[MIB; 3]).await;
            let (counter, writing) = Counter::start(&handle, &stage);
            for _ in 0..PLACES {
                counter.write_next().await;
            }
            let writing = handle.spawn(writing);
            let mut wanted = options("j");
            wanted.auto_finalize = seed % 3 > 0;
            let plan = copied(SyncMode::Full, mode);
            let job = start(&stage, plan, wanted, ErrorPolicy::Report).await;
            let job = job.expect("nothing is in the way");
            until(&stage, &job, Status::Ready).await;
            handle.sleep(Duration::from_micros(seed * 171 % 1900)).await;
            let before = counter.answered.get();
            job.cancel(false).expect("it is ready");
            if seed % 3 == 0 {
                until(&stage, &job, Status::Pending).await;
            } else {
                job.until_over().await;
            }
            let after = counter.answered.get() + 1;
            handle.sleep(Duration::from_millis(5)).await;
            if seed % 3 == 0 {
                job.finalize().expect("it is pending");
                job.until_over().await;
            }
            counter.stopped.set(true);
            writing.await;
            assert_eq!(job.error(), None);
            let copy = content_of(&stage, "copy0").await;
            if let Err(wrong) = count(&copy, before, after) {
                panic!("{wrong}");
            }
            let device = whole(&stage).await.expect("no fault");
            let answered = counter.answered.get();
            count(&device, answered, answered).expect("the device has gone on");
        });
    });
}

/// Writes go on while the target takes the device's place: none is lost.
#[test]
fn a_pivot_under_load_loses_no_write() {
    for_each_seed("a_pivot_under_load", 12, |seed| {
        simulate(seed, |handle| async move {
            let plan = MIRRORS[seed as usize % MIRRORS.len()];
            let (stage, _) = staged(&handle, seed, &[MIB; 3]).await;
            let (counter, writing) = Counter::start(&handle, &stage);
            let writing = handle.spawn(writing);
            let job = begin(&stage, plan).await;
            until(&stage, &job, Status::Ready).await;
            job.complete().expect("it is ready");
            job.until_over().await;
            assert_eq!(job.error(), None);
            assert_eq!(stage.active().name(), "copy0");
            handle.sleep(Duration::from_millis(1)).await;
            counter.stopped.set(true);
            writing.await;
            let device = whole(&stage).await.expect("no fault");
            let answered = counter.answered.get();
            count(&device, answered, answered).expect("the device has all");
            stage.assert_at_rest("after the pivot");
            let guest = stage.guest.clone();
            guest.flush().await.expect("no fault");
            stage.close().await.expect("no fault");
            assert!(content_of(&stage, "copy0").await == device);
        });
    });
}

/// What `sync` says is copied, and nothing else.
#[test]
fn a_mirror_copies_what_it_is_told_to() {
    simulate(3, |handle| async move {
        let (stage, content) = staged(&handle, 3, &[MIB; 3]).await;
        for sync in [SyncMode::Full, SyncMode::Top, SyncMode::None] {
            let job = begin(&stage, copied(sync, CopyMode::Background)).await;
            until(&stage, &job, Status::Ready).await;
            let total = job.progress().total;
            assert_eq!(job.progress().current, total);
            match sync {
                SyncMode::None => assert_eq!(total, 0),
                _ => assert!(total > 0),
            }
            let buffer = MemorySlice::from_bytes(&[7; 4096]);
            let same = MemorySlice::zeroed(4096);
            stage
                .guest
                .read(8192, same.clone().into())
                .await
                .expect("no fault");
            for payload in [buffer, same] {
                let written = stage.guest.write(8192, payload.into(), Default::default());
                written.await.expect("no fault");
            }
            job.cancel(false).expect("it is ready");
            job.until_over().await;
            let name = format!("copy{}", sync as usize);
            assert!(content_of(&stage, &name).await == content, "{sync:?}");
        }
        stage.assert_at_rest("after the mirrors");
    });
}

/// In the write-blocking mode a write is in both images when it is answered, and crosses each once.
#[test]
fn a_blocking_write_is_in_both_before_it_is_answered() {
    simulate(4, |handle| async move {
        let (stage, _) = staged(&handle, 4, &[MIB; 2]).await;
        *stage.target_kind.borrow_mut() = Kind::Raw;
        let copy = stage.prepare_target(None).await;
        let job = begin(&stage, copied(SyncMode::Full, CopyMode::WriteBlocking)).await;
        until(&stage, &job, Status::Ready).await;
        assert_eq!(job.is_in_step(), Some(true));
        let source = stage.active();
        let target = stage.graph.find("copy0").expect("it is open");
        let before = (source.statistics(), target.statistics(), job.progress());
        let mut random = Random::new(4);
        let mut length = 0;
        for stamp in 0..100_u8 {
            let start = random.below(MIB - 70_000);
            let bytes = vec![stamp; 1 + random.below(65_536) as usize];
            let payload = MemorySlice::from_bytes(&bytes);
            let written = stage.guest.write(start, payload.into(), Default::default());
            written.await.expect("no fault");
            let there = copy.disk.to_bytes();
            assert!(there[start as usize..][..bytes.len()] == bytes);
            length += bytes.len() as u64;
        }
        let after = (source.statistics(), target.statistics(), job.progress());
        assert_eq!(after.0.reads, before.0.reads, "nothing is read back");
        assert_eq!(after.0.writes, before.0.writes + 100);
        assert_eq!(after.1.writes, before.1.writes + 100, "no write twice");
        assert_eq!(after.1.written_bytes, before.1.written_bytes + length);
        assert_eq!(after.2.total, before.2.total + length);
        assert_eq!(after.2.current, after.2.total);
        assert!(job.change_copy_mode(CopyMode::Background).is_err());
        job.cancel(false).expect("it is ready");
        job.until_over().await;
        assert!(copy.disk.to_bytes() == whole(&stage).await.expect("no fault"));
    });
}

/// A guest that never pauses, with writes, zeroes and discards, does not keep a mirror from its end.
#[test]
fn a_mirror_converges_under_a_fast_writer() {
    for (seed, discards) in [(1, false), (2, true)] {
        simulate(seed, |handle| async move {
            let (stage, _) = staged(&handle, seed, &[MIB; 2]).await;
            let stopped = Rc::new(Cell::new(false));
            let writers: Vec<_> = (0..4)
                .map(|number| {
                    let (guest, stopped) = (stage.guest.clone(), stopped.clone());
                    let timer = handle.clone();
                    let mut random = Random::new(seed << 8 | number);
                    handle.spawn(async move {
                        while !stopped.get() {
                            let start = number * MIB / 4 + random.below(60) * 4096;
                            if discards {
                                let range = ByteRange::between(start, start + 8192);
                                guest.discard(range).await.expect("no fault");
                                // What is discarded already takes no time.
                                timer.sleep(Duration::from_micros(1)).await;
                                continue;
                            }
                            let bytes = vec![random.below(256) as u8; 8192];
                            let payload = MemorySlice::from_bytes(&bytes);
                            let written = guest.write(start, payload.into(), Default::default());
                            written.await.expect("no fault");
                        }
                    })
                })
                .collect();
            let job = begin(&stage, copied(SyncMode::Full, CopyMode::Background)).await;
            until(&stage, &job, Status::Ready).await;
            job.complete().expect("it is ready");
            job.until_over().await;
            assert_eq!(job.error(), None);
            stopped.set(true);
            for writer in writers {
                writer.await;
            }
            stage.assert_at_rest("after the pivot");
        });
    }
}

/// A target whose header names a backing file that comes later: clusters that a guest writes in part are filled
/// from the source, and zeroes are said.
#[test]
fn a_target_without_its_backing_file_gets_whole_clusters() {
    for_each_seed("a_target_without_its_backing_file", 6, |seed| {
        simulate(seed, |handle| async move {
            let mode = [CopyMode::Background, CopyMode::WriteBlocking][seed as usize % 2];
            let (stage, _) = staged(&handle, seed, &[MIB; 3]).await;
            let backing = stage.active().backing().expect("three layers");
            let target = stage.open_target(Some(&backing)).await.expect("it is new");
            let hold = stage
                .graph
                .attach_root("a test", &target, Permissions::NONE);
            let hold = hold.expect("wants nothing");
            let arguments = Mirror {
                copy_mode: mode,
                before: Before::Unknown,
                granularity: Some(512),
                ..mirror_of(&stage.active(), &target, SyncMode::Top, None, options("j"))
            };
            let job = mirror(&stage.workshop, arguments).await;
            let job = job.expect("nothing is in the way");
            until(&stage, &job, Status::Ready).await;
            let mut random = Random::new(seed);
            for _ in 0..40 {
                let start = random.below(MIB - 9000);
                let range = ByteRange::between(start, start + 1 + random.below(9000));
                let bytes = vec![random.below(256) as u8; range.length() as usize];
                let done = match random.below(3) {
                    0 => {
                        let zeroed = stage.guest.write_zeroes(range, Default::default());
                        zeroed.await
                    }
                    _ => {
                        let payload = MemorySlice::from_bytes(&bytes);
                        let written = stage.guest.write(start, payload.into(), Default::default());
                        written.await
                    }
                };
                done.expect("no fault");
            }
            job.cancel(false).expect("it is ready");
            job.until_over().await;
            assert_eq!(job.error(), None);
            stage.graph.detach(&hold).await.expect("no fault");
            let device = whole(&stage).await.expect("no fault");
            assert!(content_of(&stage, "copy0").await == device);
        });
    });
}

/// A target of another size is an error of the job, as in QEMU.
#[test]
fn sizes_that_differ_fail_the_job() {
    simulate(5, |handle| async move {
        let (stage, _) = staged(&handle, 5, &[MIB, MIB]).await;
        let before = stage.picture();
        let target = wrong_target(&stage, 2 * MIB).await;
        let hold = stage
            .graph
            .attach_root("a test", &target, Permissions::NONE);
        let arguments = mirror_of(&stage.active(), &target, SyncMode::Full, None, options("j"));
        let job = mirror(&stage.workshop, arguments).await;
        let job = job.expect("it fails later");
        stage
            .graph
            .detach(&hold.expect("wants nothing"))
            .await
            .expect("no fault");
        job.until_over().await;
        let expected = "Source and target image have different sizes";
        assert_eq!(job.error().as_deref(), Some(expected));
        assert_eq!(stage.picture(), before);
    });
}

async fn wrong_target(stage: &Stage, size: u64) -> Rc<Node> {
    let kind = stage.target_kind.borrow().clone();
    let image = stage.world.create("copy9", &kind, size, None, 300).await;
    stage.images.borrow_mut().push(image);
    stage.open_named("copy9").await.expect("it is new")
}

/// Each set-up fails in each way that there is, and leaves everything as it was.
#[test]
fn a_set_up_that_fails_leaves_no_trace() {
    for (plan, way) in MIRRORS
        .into_iter()
        .flat_map(|plan| (0..5).map(move |way| (plan, way)))
    {
        simulate(6, |handle| async move {
            let (stage, content) = staged(&handle, 6, &[MIB; 3]).await;
            let before = stage.picture();
            let mut job = options("j");
            let mut name = None;
            match way {
                0 => name = Some("layer0".to_owned()),
                1 => job.speed = -1,
                2 => job.id = "no id!".to_owned(),
                3 => name = Some("copy0".to_owned()),
                _ => {
                    let taken = stage
                        .workshop
                        .jobs
                        .create(liveblk::job::JobKind::Create, options("j"));
                    taken.expect("a free id");
                }
            }
            let begun = start_named(&stage, plan, job, ErrorPolicy::Report, name).await;
            let error = begun.err().expect("it cannot begin");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
            assert_eq!(stage.picture(), before, "{plan:?}, way {way}");
            assert!(whole(&stage).await.expect("no fault") == content);
        });
    }
}

/// Who reads the target, or would, is in the way.
#[test]
fn a_target_belongs_to_its_mirror_alone() {
    simulate(7, |handle| async move {
        let (stage, _) = staged(&handle, 7, &[MIB; 2]).await;
        let target = stage.open_target(None).await.expect("it is new");
        let reader = Permissions {
            required: Permission::CONSISTENT_READ,
            shared: Permission::all(),
        };
        let other = stage
            .graph
            .attach_root("an unnamed block device", &target, reader);
        let other = other.expect("nobody else is there");
        let arguments = || mirror_of(&stage.active(), &target, SyncMode::Full, None, options("j"));
        let refused = mirror(&stage.workshop, arguments()).await;
        let error = refused.err().expect("somebody reads it");
        let expected = "Permission conflict on node 'copy0': permissions 'consistent read' are both required \
                        by an unnamed block device (uses node 'copy0' as 'root' child) and unshared by an \
                        unnamed block device (uses node 'copy0' as 'root' child).";
        assert_eq!(error.message(), expected);
        let hold = stage
            .graph
            .attach_root("a test", &target, Permissions::NONE);
        stage.graph.detach(&other).await.expect("no fault");
        let job = mirror(&stage.workshop, arguments())
            .await
            .expect("nobody is in the way");
        assert!(stage.graph.attach_root("x", &target, reader).is_err());
        stage
            .graph
            .detach(&hold.expect("wants nothing"))
            .await
            .expect("no fault");
        until(&stage, &job, Status::Ready).await;
        job.complete().expect("it is ready");
        job.until_over().await;
        let other = stage.graph.attach_root("x", &stage.active(), reader);
        stage
            .graph
            .detach(&other.expect("it is the device now"))
            .await
            .expect("no fault");
        stage.assert_at_rest("after the pivot");
    });
}
