//! How much of a copy may be in flight, so that the guest does not feel it.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use crate::block::{Child, Node};
use crate::runtime::{Handle, Instant};

/// Most pieces in flight.
const MOST: usize = 16;
/// Pieces in flight while the guest does little.
const FEW: usize = 4;
/// How often the guest is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// More requests than this in a look are load.
const LITTLE: u64 = 2;

/// Looks at the guest's requests and says how many pieces of a copy may be in flight.
///
/// Every 10 ms (when asked) it counts the requests that crossed the device's edges since the last look,
/// without the job's own, and those in flight now:
///
/// | guest | pieces in flight |
/// |---|---|
/// | no request, none in flight | twice as many as before, up to 16 |
/// | at most 2 requests, at most 1 in flight | at most 4 |
/// | more | 1 |
///
/// So the copy gives way at the first look, leaves the guest a processor of two, and takes 40 ms of
/// silence to come back.
pub struct Pace {
    handle: Handle,
    device: Rc<Child>,
    own: Vec<Rc<Child>>,
    looked: Cell<Instant>,
    seen: Cell<u64>,
    limit: Cell<usize>,
    most: usize,
}

impl Pace {
    /// Looks at the node of `device`, an edge of the job that follows it. The requests of that edge and
    /// of the edges in `own` are the job's.
    pub fn new(handle: &Handle, device: Rc<Child>, mut own: Vec<Rc<Child>>) -> Pace {
        own.push(device.clone());
        let pace = Pace {
            handle: handle.clone(),
            device,
            own,
            looked: Cell::new(handle.now()),
            seen: Cell::new(0),
            limit: Cell::new(FEW),
            most: MOST,
        };
        pace.seen.set(pace.guest().requests);
        pace
    }

    /// Never lets more pieces than this be in flight.
    pub fn at_most(self, most: usize) -> Pace {
        Pace {
            most: most.clamp(1, MOST),
            ..self
        }
    }

    /// Pieces that may be in flight now; 1 to 16.
    pub fn limit(&self) -> usize {
        let now = self.handle.now();
        if now.saturating_since(self.looked.get()) >= LOOK {
            self.looked.set(now);
            self.look();
        }
        self.limit.get().min(self.most)
    }

    /// Bytes that a piece should have: short ones while there is a guest to give way to.
    pub fn piece_length(&self) -> u64 {
        self.limit();
        match self.limit.get() {
            0..=FEW => 1 << 20,
            _ => 8 << 20,
        }
    }

    fn look(&self) {
        let guest = self.guest();
        // An edge that has gone takes its count along.
        let entered = guest
            .requests
            .saturating_sub(self.seen.replace(guest.requests));
        self.limit
            .set(adapt(self.limit.get(), entered, guest.in_flight));
    }

    fn guest(&self) -> Traffic {
        let node = self.device.node();
        let mut traffic = Traffic::default();
        for edge in Node::parents(&node) {
            if !self.own.iter().any(|own| Rc::ptr_eq(own, &edge)) {
                traffic.requests += edge.requests();
                traffic.in_flight += edge.in_flight();
            }
        }
        traffic
    }
}

/// Of all edges of the guest.
#[derive(Default)]
struct Traffic {
    requests: u64,
    in_flight: u32,
}

/// The rule of [`Pace`].
fn adapt(limit: usize, entered: u64, in_flight: u32) -> usize {
    match (entered, in_flight) {
        (0, 0) => (limit * 2).min(MOST),
        (0..=LITTLE, 0..=1) => limit.clamp(2, FEW),
        _ => 1,
    }
}
