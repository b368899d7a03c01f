//! Drained sections: requests in flight end, new ones wait, then the graph may change.

use std::cell::RefCell;
use std::collections::HashSet;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use crate::error::Result;

use super::{Child, Node};

/// While it lives, no request from outside reaches the nodes it was taken for. Short: nothing that
/// waits for a job, a network peer or a client may run in it. Ends when dropped.
pub struct DrainedSection {
    gates: Vec<Rc<Child>>,
    hurried: Vec<Rc<Node>>,
    quiet: Vec<Rc<Node>>,
}

impl DrainedSection {
    /// Holds requests to `nodes` (and all that reaches them) back, and waits for those in flight.
    pub(super) async fn begin(nodes: &[Rc<Node>]) -> Result<DrainedSection> {
        let above = ancestors(nodes);
        let mut section = DrainedSection {
            gates: Vec::new(),
            hurried: Vec::new(),
            quiet: Vec::new(),
        };
        for edge in above
            .iter()
            .flat_map(|node| node.parents())
            .filter(|edge| edge.is_root())
        {
            edge.close_gate();
            section.gates.push(edge);
        }
        for node in with_descendants(&above) {
            node.driver().set_hurried(true);
            section.hurried.push(node);
        }
        for gate in &section.gates {
            gate.until_idle().await;
        }
        for node in above {
            node.driver().drain_begin().await?;
            section.quiet.push(node);
        }
        Ok(section)
    }

    /// Takes another root edge in: one that was attached inside the section.
    pub fn hold(&mut self, edge: &Rc<Child>) {
        edge.close_gate();
        self.gates.push(edge.clone());
    }
}

impl Drop for DrainedSection {
    fn drop(&mut self) {
        for node in &self.quiet {
            node.driver().drain_end();
        }
        for node in &self.hurried {
            node.driver().set_hurried(false);
        }
        for gate in &self.gates {
            gate.open_gate();
        }
    }
}

/// The nodes and all nodes above them, each once.
fn ancestors(nodes: &[Rc<Node>]) -> Vec<Rc<Node>> {
    let mut found: Vec<Rc<Node>> = Vec::new();
    let mut next: Vec<Rc<Node>> = nodes.to_vec();
    while let Some(node) = next.pop() {
        if found.iter().any(|known| Rc::ptr_eq(known, &node)) {
            continue;
        }
        next.extend(node.parents().iter().filter_map(|edge| edge.parent_node()));
        found.push(node);
    }
    found
}

/// The nodes and all nodes below them, each once: where requests to them get to.
fn with_descendants(nodes: &[Rc<Node>]) -> Vec<Rc<Node>> {
    let mut found: Vec<Rc<Node>> = Vec::new();
    let mut known: HashSet<*const Node> = HashSet::new();
    let mut next: Vec<Rc<Node>> = nodes.to_vec();
    while let Some(node) = next.pop() {
        if known.insert(Rc::as_ptr(&node)) {
            next.extend(node.children().iter().map(|edge| edge.node()));
            found.push(node);
        }
    }
    found
}

/// Tasks that wait for something to become true.
#[derive(Default)]
pub(super) struct Condition {
    waiting: RefCell<Vec<Waker>>,
}

impl Condition {
    /// Lets all who wait look again.
    pub(super) fn notify(&self) {
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// Waits until `holds`, looking at each notification.
    pub(super) async fn until(&self, holds: impl Fn() -> bool) {
        poll_fn(|context| {
            if holds() {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}
