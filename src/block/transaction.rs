//! Several changes of the graph at one moment: all of them or none.

use std::rc::Rc;

use super::{DrainedSection, Graph, IoFuture, Node};
use crate::error::Result;

/// A change that is ready to be made: whatever takes long, opening and creating, is behind it.
pub trait Action {
    /// Nodes that no request may reach while it is made.
    fn nodes(&self) -> Vec<Rc<Node>>;

    /// Makes the change. Those before it in the transaction have been made.
    ///
    /// # Errors
    /// The change was not made, or not wholly: [`Action::undo`] is not called.
    fn make<'a>(&'a self, drained: &'a DrainedSection) -> IoFuture<'a, ()>;

    /// Takes the change back after it was made. Those after it in the transaction have been taken back.
    ///
    /// # Errors
    /// The change stays.
    fn undo<'a>(&'a self, drained: &'a DrainedSection) -> IoFuture<'a, ()>;

    /// The transaction is over, requests go on: gives up what is not needed any more. Called once, also
    /// where the change was not even tried (`made` is false).
    ///
    /// # Errors
    /// Something could not be closed; the change stays.
    fn settle(&self, made: bool) -> IoFuture<'_, ()>;
}

impl Graph {
    /// Makes all changes in one drained section, in their order: a moment that is the same for all the
    /// nodes they concern. If one fails, those before it are taken back in the same section.
    ///
    /// # Errors
    /// That of the first action that failed, and nothing has changed; or that of an action that
    /// could not clean up behind itself, and everything has changed.
    pub async fn transact(&self, actions: &[Box<dyn Action>]) -> Result<()> {
        let made = self.make_all(actions).await;
        let settled = settle_all(actions, made.is_ok()).await;
        made.and(settled)
    }

    /// Ends a transaction of which nothing was made.
    pub async fn give_up(&self, actions: &[Box<dyn Action>]) {
        if let Err(error) = settle_all(actions, false).await {
            tracing::error!(%error, "a transaction that was given up left something behind");
        }
    }

    async fn make_all(&self, actions: &[Box<dyn Action>]) -> Result<()> {
        let nodes: Vec<Rc<Node>> = actions.iter().flat_map(|action| action.nodes()).collect();
        let drained = self.drain(&nodes).await?;
        for (index, action) in actions.iter().enumerate() {
            if let Err(error) = action.make(&drained).await {
                for before in actions[..index].iter().rev() {
                    if let Err(error) = before.undo(&drained).await {
                        tracing::error!(%error, "a change stays that was to be undone");
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }
}

async fn settle_all(actions: &[Box<dyn Action>], made: bool) -> Result<()> {
    let mut settled = Ok(());
    for action in actions.iter().rev() {
        settled = settled.and(action.settle(made).await);
    }
    settled
}
