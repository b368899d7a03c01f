//! Groups: the limits that nodes share, and who of them is next.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::runtime::Handle;
use crate::runtime::clock::Sleep;

use super::bucket::{Buckets, Direction};
use super::limits::ThrottleLimits;

/// A group. Its nodes take turns, in each direction.
pub struct ThrottleGroup {
    name: String,
    handle: Handle,
    state: RefCell<State>,
    members: Cell<u32>,
}

struct State {
    buckets: Buckets,
    lines: [Line; 2],
    next: u64,
}

/// Who waits in one direction: nodes in turn, the requests of each in their order.
#[derive(Default)]
struct Line(VecDeque<(u64, VecDeque<Waiter>)>);

struct Waiter {
    ticket: u64,
    waker: Option<Waker>,
}

impl Line {
    fn first(&self) -> Option<&Waiter> {
        self.0.front().and_then(|(_, waiters)| waiters.front())
    }

    fn wake_first(&self) {
        if let Some(waker) = self.first().and_then(|waiter| waiter.waker.as_ref()) {
            waker.wake_by_ref();
        }
    }

    fn add(&mut self, member: u64, ticket: u64) {
        let waiter = Waiter {
            ticket,
            waker: None,
        };
        match self.0.iter_mut().find(|(other, _)| *other == member) {
            Some((_, waiters)) => waiters.push_back(waiter),
            None => self.0.push_back((member, VecDeque::from([waiter]))),
        }
    }

    /// The request goes, and another node is next.
    fn remove(&mut self, ticket: u64) {
        let was_first = self.first().is_some_and(|first| first.ticket == ticket);
        for (_, waiters) in &mut self.0 {
            waiters.retain(|waiter| waiter.ticket != ticket);
        }
        if was_first {
            self.0.rotate_left(1);
        }
        self.0.retain(|(_, waiters)| !waiters.is_empty());
        self.wake_first();
    }

    fn set_waker(&mut self, ticket: u64, waker: &Waker) {
        let waiters = self.0.iter_mut().flat_map(|(_, waiters)| waiters);
        for waiter in waiters.filter(|waiter| waiter.ticket == ticket) {
            waiter.waker = Some(waker.clone());
        }
    }

    fn wake_member(&self, member: u64) {
        let waiting = self.0.iter().filter(|(other, _)| *other == member);
        for waker in
            waiting.flat_map(|(_, waiters)| waiters.iter().filter_map(|one| one.waker.as_ref()))
        {
            waker.wake_by_ref();
        }
    }
}

impl ThrottleGroup {
    /// A group of this name.
    pub fn new(handle: &Handle, name: &str, limits: ThrottleLimits) -> Rc<ThrottleGroup> {
        Rc::new(ThrottleGroup {
            name: name.to_owned(),
            handle: handle.clone(),
            state: RefCell::new(State {
                buckets: Buckets::new(limits, handle.now()),
                lines: Default::default(),
                next: 0,
            }),
            members: Cell::new(0),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The limits that hold now.
    pub fn limits(&self) -> ThrottleLimits {
        self.state.borrow().buckets.limits()
    }

    /// Other limits, which were checked; they hold at once, for requests that wait too.
    pub fn set_limits(&self, limits: ThrottleLimits) {
        let mut state = self.state.borrow_mut();
        state.buckets = Buckets::new(limits, self.handle.now());
        for line in &state.lines {
            line.wake_first();
        }
    }

    /// A node is in the group.
    pub fn is_used(&self) -> bool {
        self.members.get() > 0
    }

    /// Lets a request through that need not wait; false if it must.
    fn try_admit(&self, direction: Direction, bytes: u64) -> bool {
        let now = self.handle.now();
        let mut state = self.state.borrow_mut();
        let is_first = state.lines[direction.index()].first().is_none();
        let free = is_first && state.buckets.wait(direction, now).is_zero();
        if free {
            state.buckets.fill(direction, bytes, now);
        }
        free
    }

    fn poll_turn(
        &self,
        place: &Place<'_>,
        timer: &mut Option<Sleep>,
        context: &mut Context<'_>,
    ) -> Poll<()> {
        loop {
            if place.membership.hurried.get() > 0 {
                return Poll::Ready(());
            }
            let mut state = self.state.borrow_mut();
            let line = &mut state.lines[place.direction.index()];
            line.set_waker(place.ticket, context.waker());
            if line
                .first()
                .is_none_or(|first| first.ticket != place.ticket)
            {
                return Poll::Pending;
            }
            let wait = state.buckets.wait(place.direction, self.handle.now());
            drop(state);
            if wait.is_zero() {
                return Poll::Ready(());
            }
            let timer = timer.insert(self.handle.sleep(wait));
            if Future::poll(Pin::new(timer), context).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

/// A node's being in a group.
pub(super) struct Membership {
    group: Rc<ThrottleGroup>,
    number: u64,
    /// While above 0 the node's requests do not wait.
    hurried: Rc<Cell<u32>>,
}

impl Membership {
    pub(super) fn new(group: Rc<ThrottleGroup>, hurried: &Rc<Cell<u32>>) -> Membership {
        group.members.set(group.members.get() + 1);
        let number = group.ticket();
        Membership {
            group,
            number,
            hurried: hurried.clone(),
        }
    }

    pub(super) fn group(&self) -> &Rc<ThrottleGroup> {
        &self.group
    }

    /// Lets a request through that need not wait; false if it must.
    pub(super) fn try_admit(&self, direction: Direction, bytes: u64) -> bool {
        self.group.try_admit(direction, bytes)
    }

    /// Waits for the request's turn and for room.
    pub(super) async fn admit(&self, direction: Direction, bytes: u64) {
        if self.try_admit(direction, bytes) {
            return;
        }
        let place = Place::take(self, direction);
        let mut timer = None;
        poll_fn(|context| self.group.poll_turn(&place, &mut timer, context)).await;
        let now = self.group.handle.now();
        let mut state = self.group.state.borrow_mut();
        state.buckets.fill(direction, bytes, now);
    }

    /// Requests that wait look whether they still have to.
    pub(super) fn wake(&self) {
        let state = self.group.state.borrow();
        for line in &state.lines {
            line.wake_member(self.number);
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.group.members.set(self.group.members.get() - 1);
    }
}

impl ThrottleGroup {
    fn ticket(&self) -> u64 {
        let mut state = self.state.borrow_mut();
        state.next += 1;
        state.next
    }
}

/// A request's place in the line; given up when dropped.
struct Place<'a> {
    membership: &'a Membership,
    direction: Direction,
    ticket: u64,
}

impl<'a> Place<'a> {
    fn take(membership: &'a Membership, direction: Direction) -> Place<'a> {
        let ticket = membership.group.ticket();
        let mut state = membership.group.state.borrow_mut();
        state.lines[direction.index()].add(membership.number, ticket);
        Place {
            membership,
            direction,
            ticket,
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = self.membership.group.state.borrow_mut();
        state.lines[self.direction.index()].remove(self.ticket);
    }
}

/// All groups, by name. Cheap to clone: a handle.
#[derive(Clone, Default)]
pub struct ThrottleGroups {
    groups: Rc<RefCell<Vec<Rc<ThrottleGroup>>>>,
}

impl ThrottleGroups {
    /// The group of this name.
    pub fn find(&self, name: &str) -> Option<Rc<ThrottleGroup>> {
        let groups = self.groups.borrow();
        groups.iter().find(|group| group.name == name).cloned()
    }

    /// One more; its name is not taken.
    pub fn add(&self, group: Rc<ThrottleGroup>) {
        self.groups.borrow_mut().push(group);
    }

    /// The group of this name is no more; no node is in it.
    pub fn remove(&self, name: &str) {
        self.groups.borrow_mut().retain(|group| group.name != name);
    }
}
