use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Config, Elapsed, PollPolicy, Runtime};

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

/// A runtime that may poll for a second and has learnt to do so for a while.
fn polling() -> Runtime {
    let runtime = Runtime::new(&Config {
        polling: PollPolicy {
            max_ns: 1_000_000_000,
            ..PollPolicy::default()
        },
        ..Config::default()
    });
    let runtime = runtime.expect("io_uring is needed by these tests");
    let handle = runtime.handle();
    runtime.block_on(handle.sleep(Duration::from_millis(200)));
    assert!(handle.core.polling.time() > Duration::from_millis(200));
    runtime
}

/// While it polls it is not asleep in the kernel, where each of these would wake it.
#[test]
fn a_polling_loop_hears_timers_other_threads_and_the_kernel() {
    let runtime = polling();
    let handle = runtime.handle();
    let began = std::time::Instant::now();
    let enters = handle.ring().enters();
    runtime.block_on(async {
        handle.sleep(Duration::from_millis(2)).await;
        handle
            .blocking(|| std::thread::sleep(Duration::from_millis(2)))
            .await;
        let (reader, writer) = nix::unistd::pipe().expect("pipe");
        let reader = handle.ring().file(reader);
        let polled = handle
            .ring()
            .poll_add(&reader, nix::poll::PollFlags::POLLIN);
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(2));
            nix::unistd::write(&writer, b"x").expect("pipe is open");
            std::thread::sleep(Duration::from_millis(500));
        });
        polled.await.expect("polled");
    });
    assert!(
        began.elapsed() < Duration::from_millis(500),
        "{:?}",
        began.elapsed()
    );
    let enters = handle.ring().enters() - enters;
    assert!(enters < 50, "{enters} system calls while it polled");
}

/// Nothing to do must cost nothing: after one wait that was too long it sleeps at once.
#[test]
fn an_idle_loop_does_not_poll() {
    let runtime = Runtime::new(&Config {
        polling: PollPolicy {
            max_ns: 5_000_000,
            ..PollPolicy::default()
        },
        ..Config::default()
    });
    let runtime = runtime.expect("io_uring is needed by these tests");
    let handle = runtime.handle();
    runtime.block_on(async {
        for _ in 0..20 {
            handle.sleep(Duration::from_millis(1)).await;
        }
        assert!(
            !handle.core.polling.time().is_zero(),
            "it polls for timers that are near"
        );
        let before = processor_time();
        for _ in 0..20 {
            handle.sleep(Duration::from_millis(20)).await;
            assert!(handle.core.polling.time().is_zero());
        }
        let spent = processor_time() - before;
        assert!(spent < Duration::from_millis(20), "{spent:?} of 400 ms");
    });
}

/// What this thread has used.
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    let nanoseconds = text
        .split(' ')
        .next()
        .and_then(|number| number.parse().ok());
    Duration::from_nanos(nanoseconds.expect("a number"))
}
