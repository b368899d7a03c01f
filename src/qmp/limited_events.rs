//! Events that may come in floods: at most one a second of each kind and source.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use serde_json::Value;

use super::events::EventBus;
use crate::runtime::Handle;

/// QEMU's limit, which clients count on.
const PERIOD: Duration = Duration::from_secs(1);

/// Lets the first event of a kind and source pass at once, and of those that follow within a second the
/// last at its end.
pub(super) struct LimitedEvents {
    handle: Handle,
    bus: EventBus,
    /// What waits, by kind and source, while a second runs.
    waiting: Rc<RefCell<HashMap<Key, Option<Value>>>>,
}

type Key = (&'static str, String);

impl LimitedEvents {
    pub(super) fn new(handle: &Handle, bus: &EventBus) -> LimitedEvents {
        LimitedEvents {
            handle: handle.clone(),
            bus: bus.clone(),
            waiting: Rc::default(),
        }
    }

    /// Tells everybody, now or within a second, unless a later one takes its place.
    pub(super) fn emit(&self, name: &'static str, source: &str, data: Value) {
        let key = (name, source.to_owned());
        if let Some(waiting) = self.waiting.borrow_mut().get_mut(&key) {
            *waiting = Some(data);
            return;
        }
        self.waiting.borrow_mut().insert(key.clone(), None);
        self.bus.emit(name, data);
        let (handle, bus, waiting) = (self.handle.clone(), self.bus.clone(), self.waiting.clone());
        let second = async move {
            loop {
                handle.sleep(PERIOD).await;
                let last = waiting.borrow_mut().get_mut(&key).and_then(Option::take);
                match last {
                    Some(data) => bus.emit(key.0, data),
                    None => break,
                }
            }
            waiting.borrow_mut().remove(&key);
        };
        self.handle.spawn(second).detach();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::qmp::events::Subscriber;
    use crate::runtime::Runtime;

    #[derive(Default)]
    struct Log(RefCell<Vec<u64>>);

    impl Subscriber for Log {
        fn event(&self, event: &Value) {
            let number = event["data"]["reason"].as_u64().expect("a number");
            self.0.borrow_mut().push(number);
        }
    }

    #[test]
    fn a_flood_is_cut_to_its_first_and_the_last_of_each_second() {
        let runtime = Runtime::simulated(1).expect("runtime");
        let handle = runtime.handle();
        let bus = EventBus::new();
        let log = Rc::new(Log::default());
        bus.subscribe(&(log.clone() as Rc<dyn Subscriber>));
        let events = LimitedEvents::new(&handle, &bus);
        runtime.block_on(async {
            for number in 0..25 {
                events.emit("BLOCK_IO_ERROR", "e0", json!({"reason": number}));
                handle.sleep(Duration::from_millis(95)).await;
            }
            events.emit("BLOCK_IO_ERROR", "other", json!({"reason": 100}));
            handle.sleep(Duration::from_secs(3)).await;
            events.emit("BLOCK_IO_ERROR", "e0", json!({"reason": 25}));
        });
        assert_eq!(*log.0.borrow(), [0, 10, 21, 100, 24, 25]);
    }
}
