//! `blockdev-reopen`: other options and other children for nodes in use, all or none.
//!
//! Each described node becomes a [`Change`]; so do the children that were opened for it. Then, in one
//! drained section, options and edges are changed step by step; a step that fails undoes those before.

use std::rc::Rc;

use crate::block::{Child, DrainedSection, Node, NodeOptions, Permission, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::{Preallocate, PreallocateOptions, Throttle, ThrottleGroup};
use crate::format::qcow2::Qcow2;
use crate::format::raw::{Raw, RawOptions};
use crate::protocol::file::File;

use super::description::{Description, DriverOptions};
use super::filter_description::FilterOptions;
use super::origin::Origin;
use super::reopen_children::Plan;
use super::value::{Value, invalid};
use super::{Blockdev, file_name, names};

/// A node that gets other options.
pub(super) struct Change {
    pub(super) node: Rc<Node>,
    pub(super) given: Description,
    pub(super) options: NodeOptions,
    before: NodeOptions,
}

impl Change {
    pub(super) fn new(node: &Rc<Node>, given: Description, options: NodeOptions) -> Change {
        Change {
            node: node.clone(),
            given,
            options,
            before: node.options(),
        }
    }

    fn turns_read_only(&self) -> bool {
        self.options.read_only && !self.before.read_only
    }

    fn turns_writable(&self) -> bool {
        !self.options.read_only && self.before.read_only
    }
}

/// An edge that gets another node, or goes.
pub(super) struct Replacement {
    pub(super) parent: Rc<Node>,
    pub(super) role: Role,
    pub(super) new: Option<Rc<Node>>,
}

/// A step that was taken, and how to go back.
enum Step {
    Options(Rc<Node>, NodeOptions),
    Part(Rc<Node>, RawOptions),
    Group(Rc<Node>, Rc<ThrottleGroup>),
    Preallocation(Rc<Node>, PreallocateOptions),
    Edge(Rc<Child>, Rc<Node>),
    Backing(Rc<Node>, Option<Rc<Node>>),
    ReadOnly(Rc<Node>, bool),
}

impl Blockdev {
    /// `blockdev-reopen`: gives each described node just the options of its description, those not
    /// given their defaults, and the children that are referred to.
    ///
    /// # Errors
    /// In QEMU's words; nothing has changed.
    pub async fn reopen(&self, descriptions: Vec<Value>) -> Result<()> {
        let mut listed: Vec<(Rc<Node>, Description)> = Vec::new();
        for (index, value) in descriptions.into_iter().enumerate() {
            let given = Description::parse_at(value, &format!("options[{index}]."))?;
            let Some(name) = &given.node_name else {
                return Err(invalid("node-name not specified"));
            };
            let node = names::find_listed(&self.graph, name)?;
            if listed.iter().any(|(other, _)| Rc::ptr_eq(other, &node)) {
                return Err(invalid(format!("Node '{name}' is listed twice")));
            }
            listed.push((node, given));
        }
        let mut plan = Plan::new(&self.graph);
        for (node, given) in listed {
            plan.add_listed(&node, given)?;
        }
        self.carry_out(plan).await
    }

    async fn carry_out(&self, plan: Plan<'_>) -> Result<()> {
        let Plan {
            changes,
            replacements,
            ..
        } = plan;
        check_writers(&changes)?;
        let mut nodes: Vec<Rc<Node>> = changes.iter().map(|change| change.node.clone()).collect();
        nodes.extend(replacements.iter().filter_map(|one| one.new.clone()));
        let left: Vec<Rc<Node>> = replacements
            .iter()
            .filter_map(|one| Some(one.parent.child(one.role)?.node()))
            .collect();
        let drained = self.graph.drain(&nodes).await?;
        let mut steps = Vec::new();
        let done = self
            .take_steps(&drained, &changes, &replacements, &mut steps)
            .await;
        if done.is_err() {
            self.go_back(&drained, steps).await;
        }
        drop(drained);
        if done.is_ok() {
            self.remember(changes);
            for node in left {
                self.discard_failed(&node).await;
            }
        }
        file_name::refresh_all(&self.graph);
        done
    }

    async fn take_steps(
        &self,
        drained: &DrainedSection,
        changes: &[Change],
        replacements: &[Replacement],
        steps: &mut Vec<Step>,
    ) -> Result<()> {
        for change in changes.iter().filter(|change| change.turns_read_only()) {
            change.node.driver().set_read_only(true).await?;
            steps.push(Step::ReadOnly(change.node.clone(), false));
            self.tell_filters(&change.node).await;
        }
        for replacement in replacements {
            self.tell_filters(&replacement.parent).await;
        }
        for change in changes {
            steps.push(Step::Options(change.node.clone(), change.before));
            apply_options(&change.node, change.options);
        }
        for replacement in replacements {
            self.replace(drained, replacement, steps)?;
        }
        for change in changes {
            self.apply_part(change, steps)?;
        }
        let nodes: Vec<Rc<Node>> = changes.iter().map(|change| change.node.clone()).collect();
        self.graph.refresh_permissions(&nodes)?;
        for change in changes.iter().filter(|change| change.turns_writable()) {
            change.node.driver().set_read_only(false).await?;
            steps.push(Step::ReadOnly(change.node.clone(), true));
        }
        Ok(())
    }

    fn replace(
        &self,
        drained: &DrainedSection,
        replacement: &Replacement,
        steps: &mut Vec<Step>,
    ) -> Result<()> {
        let Replacement { parent, role, new } = replacement;
        if *role == Role::Backing {
            let before = parent.child(Role::Backing).map(|edge| edge.node());
            self.graph.set_backing(drained, parent, new.as_ref())?;
            steps.push(Step::Backing(parent.clone(), before));
            return Ok(());
        }
        let (Some(edge), Some(new)) = (parent.child(*role), new) else {
            return Ok(());
        };
        let before = edge.node();
        self.graph
            .redirect(drained, std::slice::from_ref(&edge), new)?;
        steps.push(Step::Edge(edge, before));
        Ok(())
    }

    async fn go_back(&self, drained: &DrainedSection, steps: Vec<Step>) {
        let mut nodes = Vec::new();
        for step in steps.into_iter().rev() {
            let undone = match step {
                Step::Options(node, options) => {
                    apply_options(&node, options);
                    nodes.push(node);
                    Ok(())
                }
                Step::Part(node, part) => match node.driver_as::<Raw>() {
                    Some(raw) => raw.set_options(part),
                    None => Ok(()),
                },
                Step::Group(node, group) => {
                    if let Some(throttle) = node.driver_as::<Throttle>() {
                        throttle.set_group(group);
                    }
                    Ok(())
                }
                Step::Preallocation(node, before) => match node.driver_as::<Preallocate>() {
                    Some(filter) => filter.set_options(before),
                    None => Ok(()),
                },
                Step::Edge(edge, node) => self.graph.redirect(drained, &[edge], &node),
                Step::Backing(node, before) => {
                    self.graph.set_backing(drained, &node, before.as_ref())
                }
                Step::ReadOnly(node, read_only) => {
                    // Only after its options are back may it be written.
                    let refreshed = self.graph.refresh_permissions(std::slice::from_ref(&node));
                    match refreshed {
                        Ok(()) => node.driver().set_read_only(read_only).await,
                        Err(error) => Err(error),
                    }
                }
            };
            if let Err(error) = undone {
                tracing::error!(%error, "a failed reopen cannot be undone");
            }
        }
        if let Err(error) = self.graph.refresh_permissions(&nodes) {
            tracing::error!(%error, "permissions after a failed reopen");
        }
    }

    fn remember(&self, changes: Vec<Change>) {
        for change in changes {
            if let Some(origin) = Origin::of(&change.node) {
                *origin.given.borrow_mut() = change.given;
            }
            if change.node.backing().is_none() {
                super::chain::note_automatic(&change.node);
            }
        }
    }
}

impl Blockdev {
    /// Filters below a node lose a writer, for now or for good. In a drained section.
    pub(super) async fn tell_filters(&self, node: &Node) {
        let mut below = node.storage();
        while let Some(edge) = below {
            let filter = edge.node();
            if !filter.driver().is_filter() {
                break;
            }
            if let Err(error) = filter.driver().writers_gone().await {
                tracing::warn!(node = filter.name(), %error, "after the last writer");
            }
            below = filter.filtered();
        }
    }

    /// Options that only one driver has.
    fn apply_part(&self, change: &Change, steps: &mut Vec<Step>) -> Result<()> {
        let node = &change.node;
        match &change.given.driver {
            DriverOptions::Raw { part, .. } => {
                if let Some(raw) = node.driver_as::<Raw>() {
                    let before = raw.options();
                    raw.set_options(*part)?;
                    steps.push(Step::Part(node.clone(), before));
                }
            }
            DriverOptions::Qcow2 { options, .. } => {
                if let Some(image) = node.driver_as::<Qcow2>() {
                    let unmap = change.options.discard == crate::block::DiscardMode::Unmap;
                    image.set_pass_discard(options.pass_discard_request.unwrap_or(unmap));
                }
            }
            DriverOptions::Filter(filter) => self.apply_filter(node, &filter.options, steps)?,
            DriverOptions::File(_) | DriverOptions::Null(_) | DriverOptions::Nbd(_) => {}
        }
        Ok(())
    }

    fn apply_filter(
        &self,
        node: &Rc<Node>,
        options: &FilterOptions,
        steps: &mut Vec<Step>,
    ) -> Result<()> {
        match options {
            FilterOptions::Throttle { group } => {
                if let Some(throttle) = node.driver_as::<Throttle>() {
                    let before = throttle.group();
                    throttle.set_group(self.throttle_group(group)?);
                    steps.push(Step::Group(node.clone(), before));
                }
            }
            FilterOptions::Preallocate(options) => {
                if let Some(filter) = node.driver_as::<Preallocate>() {
                    let before = filter.options();
                    filter.set_options(*options)?;
                    steps.push(Step::Preallocation(node.clone(), before));
                }
            }
            FilterOptions::CopyOnRead { .. }
            | FilterOptions::CopyBeforeWrite(_)
            | FilterOptions::SnapshotAccess
            | FilterOptions::Blkdebug(_) => {}
        }
        Ok(())
    }
}

/// A node that somebody outside of the list writes to cannot turn read-only.
fn check_writers(changes: &[Change]) -> Result<()> {
    let write = Permission::WRITE | Permission::WRITE_UNCHANGED | Permission::RESIZE;
    for change in changes.iter().filter(|change| change.turns_read_only()) {
        let is_written = change.node.parents().iter().any(|edge| {
            let parent = edge.parent_node();
            let changes_too = parent
                .is_some_and(|parent| changes.iter().any(|other| Rc::ptr_eq(&other.node, &parent)));
            !changes_too && edge.permissions().required.intersects(write)
        });
        if is_written {
            let name = change.node.name();
            let text = format!("Read-only block node '{name}' cannot support read-write users");
            return Err(Error::new(ErrorKind::Permission, text));
        }
    }
    Ok(())
}

/// Tells the node and its driver; locks and descriptors follow with the permissions.
fn apply_options(node: &Node, options: NodeOptions) {
    node.set_options(options);
    if let Some(file) = node.driver_as::<File>() {
        file.set_options(
            options.auto_read_only,
            options.cache_direct,
            options.cache_no_flush,
        );
    }
}
