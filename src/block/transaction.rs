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

    /// All changes have been made: what is stored follows this one, as far as belongs to the stage. Is called
    /// for the gains once more after everything was taken back: what is stored is then to be as before.
    ///
    /// # Errors
    /// What is stored is as it was, or has more than it must.
    fn store<'a>(&'a self, drained: &'a DrainedSection, stage: Stage) -> IoFuture<'a, ()> {
        let _ = (drained, stage);
        Box::pin(async { Ok(()) })
    }

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

/// What is stored follows changes in this order, each stage of all actions before the next, so that a crash
/// never finds what one has given up without what another has kept of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// What is new is stored, beside all that was there.
    Gains,
    /// What nobody needs any more goes.
    Losses,
    /// What is not written from now on is closed for writing.
    Closing,
}

impl Graph {
    /// Makes all changes in one drained section, in their order: a moment that is the same for all the
    /// nodes they concern. If one fails, or what is stored cannot follow them, all are taken back in the same
    /// section.
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
                undo_all(&actions[..index], &drained).await;
                return Err(error);
            }
        }
        if let Err(error) = store_all(actions, &drained).await {
            undo_all(actions, &drained).await;
            // What has given something away has it again before what has got it loses it.
            for action in actions.iter().rev() {
                log_stays(action.store(&drained, Stage::Gains).await);
            }
            return Err(error);
        }
        Ok(())
    }
}

async fn undo_all(actions: &[Box<dyn Action>], drained: &DrainedSection) {
    for action in actions.iter().rev() {
        log_stays(action.undo(drained).await);
    }
}

fn log_stays(undone: Result<()>) {
    if let Err(error) = undone {
        tracing::error!(%error, "a change stays that was to be undone");
    }
}

async fn store_all(actions: &[Box<dyn Action>], drained: &DrainedSection) -> Result<()> {
    for stage in [Stage::Gains, Stage::Losses, Stage::Closing] {
        for action in actions {
            action.store(drained, stage).await?;
        }
    }
    Ok(())
}

async fn settle_all(actions: &[Box<dyn Action>], made: bool) -> Result<()> {
    let mut settled = Ok(());
    for action in actions.iter().rev() {
        settled = settled.and(action.settle(made).await);
    }
    settled
}
