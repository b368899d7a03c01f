//! Events: from whoever notices something to every client that has negotiated.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::schema;

/// Distributes events; cheap to clone.
#[derive(Clone, Default)]
pub struct EventBus {
    subscribers: Rc<RefCell<Vec<Weak<dyn Subscriber>>>>,
}

/// Who wants events.
pub trait Subscriber {
    /// An event, complete with its timestamp.
    fn event(&self, event: &Value);
}

impl EventBus {
    /// Nobody listens.
    pub fn new() -> EventBus {
        EventBus::default()
    }

    /// Tells the subscriber of events for as long as it lives.
    pub fn subscribe(&self, subscriber: &Rc<dyn Subscriber>) {
        let mut subscribers = self.subscribers.borrow_mut();
        subscribers.retain(|known| known.strong_count() > 0);
        subscribers.push(Rc::downgrade(subscriber));
    }

    /// Tells everybody of an event, which the schema must know; `data` is an object, or null for none.
    pub fn emit(&self, name: &str, data: Value) {
        debug_assert!(
            schema::events().any(|event| event.name == name),
            "event {name} is not in the schema"
        );
        let mut event = json!({"event": name, "timestamp": timestamp(SystemTime::now())});
        if !data.is_null() {
            event["data"] = data;
        }
        tracing::debug!(event = name, "event");
        let subscribers: Vec<_> = self.subscribers.borrow().clone();
        for subscriber in subscribers.iter().filter_map(Weak::upgrade) {
            subscriber.event(&event);
        }
    }
}

/// The wall clock; (-1, -1) if it stands before 1970.
fn timestamp(now: SystemTime) -> Value {
    match now.duration_since(UNIX_EPOCH) {
        Ok(time) => json!({"seconds": time.as_secs(), "microseconds": time.subsec_micros()}),
        Err(_) => json!({"seconds": -1, "microseconds": -1}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(RefCell<Vec<Value>>);

    impl Subscriber for Log {
        fn event(&self, event: &Value) {
            self.0.borrow_mut().push(event.clone());
        }
    }

    #[test]
    fn subscribers_get_events_while_they_live() {
        let bus = EventBus::new();
        let (first, second) = (Rc::new(Log::default()), Rc::new(Log::default()));
        bus.subscribe(&(first.clone() as Rc<dyn Subscriber>));
        bus.subscribe(&(second.clone() as Rc<dyn Subscriber>));
        bus.emit("STOP", Value::Null);
        drop(second);
        bus.emit("BLOCK_EXPORT_DELETED", json!({"id": "e"}));
        let log = first.0.borrow();
        assert_eq!(log.len(), 2);
        assert_eq!(log[0].get("data"), None, "no data, no member");
        assert_eq!(log[1]["data"]["id"], "e");
        assert!(log[1]["timestamp"]["seconds"].as_u64() > Some(1_500_000_000));
    }

    #[test]
    fn a_clock_before_its_epoch_is_told() {
        let before = UNIX_EPOCH - std::time::Duration::from_secs(1);
        assert_eq!(timestamp(before)["seconds"], -1);
    }
}
