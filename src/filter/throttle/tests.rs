//! Rates, turns and changes, in virtual time.

use std::time::Duration;

use super::*;
use crate::block::{Child, Graph, Node};
use crate::buffer::MemorySlice;
use crate::runtime::Handle;
use crate::testing::{attach, disk_of, full_access, insert, insert_with, simulate, writable};

const SIZE: u64 = 1 << 20;

fn limits(values: &[(&str, i64)]) -> ThrottleLimits {
    let mut limits = ThrottleLimits::default();
    for (name, value) in values {
        assert!(limits.set(name, *value), "{name}");
    }
    limits.check().expect("they go together");
    limits
}

/// A disk under a node of the group, and an edge to it.
fn throttled(
    handle: &Handle,
    graph: &Graph,
    name: &str,
    group: &Rc<ThrottleGroup>,
) -> (Rc<Node>, Rc<Child>) {
    let disk = disk_of(handle, &vec![0; SIZE as usize], 1);
    let below = insert(graph, &format!("{name}-disk"), disk.driver());
    let file = graph.attach_for(name, Role::File, &below, Permissions::NONE);
    let file = file.expect("no other user");
    let driver = Throttle::new(file.clone(), group.clone());
    let node = insert_with(graph, name, Box::new(driver), vec![file], writable());
    let guest = attach(graph, &node, full_access());
    (node, guest)
}

/// Eight requests of this size at a time until the time is over; how many were answered.
async fn load(
    handle: &Handle,
    guest: &Rc<Child>,
    write: bool,
    length: usize,
    time: Duration,
) -> u64 {
    let end = handle.now() + time;
    let workers: Vec<_> = (0..8)
        .map(|_| {
            let (handle, guest) = (handle.clone(), guest.clone());
            handle.clone().spawn(async move {
                let mut answered = 0;
                while handle.now() < end {
                    let payload = MemorySlice::zeroed(length).into();
                    let done = match write {
                        true => guest.write(0, payload, WriteFlags::empty()).await,
                        false => guest.read(0, payload).await,
                    };
                    done.expect("no fault");
                    answered += u64::from(handle.now() <= end);
                }
                answered
            })
        })
        .collect();
    let mut all = 0;
    for worker in workers {
        all += worker.await;
    }
    all
}

fn assert_near(found: u64, expected: u64, what: &str) {
    let off = found.abs_diff(expected) as f64 / expected as f64;
    assert!(off <= 0.05, "{what}: {found}, expected {expected}");
}

/// What `load` gets of these limits in so many seconds.
fn answered(values: &[(&str, i64)], write: bool, length: usize, seconds: u64) -> u64 {
    let limits = limits(values);
    simulate(1, |handle| async move {
        let group = ThrottleGroup::new(&handle, "g", limits);
        let (_, guest) = throttled(&handle, &Graph::new(), "t", &group);
        load(&handle, &guest, write, length, Duration::from_secs(seconds)).await
    })
}

#[test]
fn rates_hold() {
    assert_near(
        answered(&[("iops-total", 100)], false, 512, 20),
        2000,
        "iops",
    );
    let writes = answered(&[("bps-write", 1 << 20)], true, 8192, 20);
    assert_near(writes, 20 * 128, "bps");
    let sized = [("iops-read", 100), ("iops-size", 4096)];
    assert_near(answered(&sized, false, 16384, 20), 20 * 25, "iops by size");
    let reads = answered(&[("iops-write", 10)], false, 512, 1);
    assert!(reads > 1000, "reads are not limited: {reads}");
}

/// 5 seconds at 400 a second, then 100 a second.
#[test]
fn a_burst_lasts_as_long_as_it_may() {
    let burst = [
        ("iops-total", 100),
        ("iops-total-max", 400),
        ("iops-total-max-length", 5),
    ];
    // The bucket of a burst holds 400 * 5 and leaks meanwhile.
    assert_near(answered(&burst, true, 512, 20), 2000 + 20 * 100, "burst");
}

#[test]
fn nodes_of_a_group_share_alike() {
    simulate(2, |handle| async move {
        let group = ThrottleGroup::new(&handle, "g", limits(&[("iops-total", 300)]));
        let graph = Graph::new();
        let time = Duration::from_secs(20);
        let loads: Vec<_> = ["a", "b", "c"]
            .iter()
            .map(|name| {
                let (_, guest) = throttled(&handle, &graph, name, &group);
                let task_handle = handle.clone();
                handle.spawn(async move { load(&task_handle, &guest, false, 512, time).await })
            })
            .collect();
        for load in loads {
            assert_near(load.await, 2000, "a third");
        }
    });
}

#[test]
fn reads_and_writes_share_a_total() {
    simulate(3, |handle| async move {
        let group = ThrottleGroup::new(&handle, "g", limits(&[("iops-total", 200)]));
        let (_, guest) = throttled(&handle, &Graph::new(), "t", &group);
        let time = Duration::from_secs(20);
        let (one, two) = (handle.clone(), guest.clone());
        let writes = handle.spawn(async move { load(&one, &two, true, 512, time).await });
        let reads = load(&handle, &guest, false, 512, time).await;
        let writes = writes.await;
        assert_near(reads + writes, 4000, "both");
        assert!(
            reads > 1000 && writes > 1000,
            "{reads} reads, {writes} writes"
        );
    });
}

/// A request that would wait for an hour is let through by new limits.
#[test]
fn limits_change_for_those_who_wait() {
    simulate(4, |handle| async move {
        let group = ThrottleGroup::new(&handle, "g", limits(&[("bps-total", 1)]));
        let (_, guest) = throttled(&handle, &Graph::new(), "t", &group);
        let begin = handle.now();
        let (one, two) = (handle.clone(), guest.clone());
        let time = Duration::from_secs(30);
        let task = handle.spawn(async move { load(&one, &two, false, 4096, time).await });
        handle.sleep(Duration::from_secs(10)).await;
        group.set_limits(limits(&[("iops-total", 50)]));
        // One at the start, then 50 a second for 20 seconds.
        assert_near(task.await, 1000, "after the change");
        assert!(handle.now() - begin < Duration::from_secs(31));
    });
}

/// Nothing waits in a drained section, and it does not take the time that requests would have waited.
#[test]
fn a_drained_section_lets_requests_through() {
    simulate(5, |handle| async move {
        let group = ThrottleGroup::new(&handle, "g", limits(&[("iops-total", 1)]));
        let graph = Graph::new();
        let (node, guest) = throttled(&handle, &graph, "t", &group);
        let (one, two) = (handle.clone(), guest.clone());
        let time = Duration::from_secs(2);
        let task = handle.spawn(async move { load(&one, &two, true, 512, time).await });
        handle.sleep(Duration::from_millis(100)).await;
        assert_eq!(guest.in_flight(), 8);
        let begin = handle.now();
        let below = node.filtered().expect("a filter").node();
        let drained = graph.drain(&[below]).await.expect("no fault");
        assert_eq!(guest.in_flight(), 0);
        assert!(handle.now() - begin < Duration::from_millis(100));
        drop(drained);
        assert!(task.await >= 8);
        // What passed counts: the bucket is overfull.
        assert!(handle.now() - begin > Duration::from_secs(5));
    });
}

#[test]
fn a_request_that_is_given_up_leaves_its_place() {
    simulate(6, |handle| async move {
        let group = ThrottleGroup::new(&handle, "g", limits(&[("iops-total", 10)]));
        let (_, guest) = throttled(&handle, &Graph::new(), "t", &group);
        let read = || guest.read(0, MemorySlice::zeroed(512).into());
        for _ in 0..2 {
            read().await.expect("no fault");
        }
        let short = handle.timeout(Duration::from_millis(1), read()).await;
        assert!(short.is_err(), "it had to wait");
        let long = handle.timeout(Duration::from_secs(1), read()).await;
        long.expect("the place is free").expect("no fault");
        assert!(group.is_used());
    });
}
