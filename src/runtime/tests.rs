use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Config, Elapsed, Runtime};

fn real() -> Runtime {
    Runtime::new(&Config::default()).expect("io_uring is needed by these tests")
}

/// Many tasks that interleave: the order in which they ran.
fn interleaving(seed: u64) -> Vec<(usize, usize)> {
    let runtime = Runtime::simulated(seed).expect("runtime");
    let handle = runtime.handle();
    let log = Rc::new(RefCell::new(Vec::new()));
    runtime.block_on(async {
        let tasks: Vec<_> = (0..8)
            .map(|task| {
                let (log, handle) = (log.clone(), handle.clone());
                handle.clone().spawn(async move {
                    for step in 0..8 {
                        log.borrow_mut().push((task, step));
                        handle.yield_now().await;
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
    });
    log.take()
}

#[test]
fn a_simulated_run_is_its_seed() {
    assert_eq!(interleaving(42), interleaving(42));
    assert_ne!(interleaving(42), interleaving(43));
}

#[test]
fn timers_fire_in_order_of_virtual_time() {
    let runtime = Runtime::simulated(5).expect("runtime");
    let handle = runtime.handle();
    let log = Rc::new(RefCell::new(Vec::new()));
    let before = std::time::Instant::now();
    runtime.block_on(async {
        let tasks: Vec<_> = [3600, 1, 60, 86400]
            .into_iter()
            .map(|seconds| {
                let (log, handle) = (log.clone(), handle.clone());
                handle.clone().spawn(async move {
                    handle.sleep(Duration::from_secs(seconds)).await;
                    assert_eq!(handle.now().since_start().as_secs(), seconds);
                    log.borrow_mut().push(seconds);
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
    });
    assert_eq!(log.take(), [1, 60, 3600, 86400]);
    assert!(
        before.elapsed() < Duration::from_secs(10),
        "virtual time does not pass"
    );
}

#[test]
fn real_timers_wait_and_a_timeout_drops_its_future() {
    let runtime = real();
    let handle = runtime.handle();
    runtime.block_on(async {
        let before = handle.now();
        handle.sleep(Duration::from_millis(20)).await;
        assert!(handle.now() - before >= Duration::from_millis(20));
        let never = Rc::new(());
        let held = never.clone();
        let waiting = async move {
            let _held = held;
            std::future::pending::<()>().await;
        };
        let limited = handle.timeout(Duration::from_millis(5), waiting);
        assert_eq!(limited.await, Err(Elapsed));
        assert_eq!(Rc::strong_count(&never), 1);
    });
}

#[test]
#[should_panic(expected = "deadlock in simulation")]
fn a_deadlock_in_simulation_is_noticed() {
    let runtime = Runtime::simulated(0).expect("runtime");
    runtime.block_on(std::future::pending::<()>());
}

#[test]
fn other_threads_wake_a_sleeping_ring() {
    let runtime = real();
    let handle = runtime.handle();
    runtime.block_on(async {
        // No timer is set: a lost wake-up would hang here.
        for number in 0..200_u64 {
            let doubled = handle.blocking(move || {
                std::thread::sleep(Duration::from_micros(number));
                number * 2
            });
            assert_eq!(doubled.await, number * 2);
        }
    });
}

#[test]
fn posted_jobs_run_in_order_and_not_after_the_runtime() {
    let runtime = real();
    let remote = runtime.handle().remote();
    let counter = Arc::new(Mutex::new(0));
    let handle = runtime.handle();
    let posting = counter.clone();
    let posted = handle.blocking(move || {
        for number in 1..=100_u32 {
            let counter = posting.clone();
            let posted = remote.post(Box::new(move |_| {
                let mut last = counter.lock().expect("not poisoned");
                assert_eq!(*last + 1, number);
                *last = number;
            }));
            assert!(posted, "the runtime lives");
        }
        remote
    });
    let remote = runtime.block_on(posted);
    runtime.block_on(handle.yield_now());
    runtime.block_on(handle.sleep(Duration::from_millis(1)));
    assert_eq!(*counter.lock().expect("not poisoned"), 100);
    drop(runtime);
    assert!(!remote.post(Box::new(|_| ())), "nobody is there to run it");
}

#[test]
fn aborted_and_detached_tasks() {
    let runtime = real();
    let handle = runtime.handle();
    runtime.block_on(async {
        let alive = Rc::new(());
        let held = alive.clone();
        let aborted = handle.spawn(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        let ran = Rc::new(RefCell::new(false));
        let flag = ran.clone();
        handle
            .spawn(async move { *flag.borrow_mut() = true })
            .detach();
        handle.yield_now().await;
        assert!(ran.take());
        aborted.abort();
        assert_eq!(Rc::strong_count(&alive), 1);
        assert_eq!(handle.tasks(), 0);
    });
}
