//! Computes the permissions of all edges below some nodes, checks them, and applies them all or none.

use std::rc::Rc;

use crate::error::{Error, ErrorKind, Result};

use super::{Child, Node, Permission, Permissions};

/// New permissions that were checked and for which drivers have got ready.
pub(super) struct PermissionUpdate {
    edges: Vec<(Rc<Child>, Permissions)>,
    prepared: Vec<Rc<Node>>,
}

impl PermissionUpdate {
    /// Computes what follows, for all below `nodes`, from their edges above and their options.
    ///
    /// # Errors
    /// Users of a node are in each other's way, a node is read-only, or a driver refuses.
    pub(super) fn prepare(nodes: &[Rc<Node>]) -> Result<PermissionUpdate> {
        let mut update = PermissionUpdate {
            edges: Vec::new(),
            prepared: Vec::new(),
        };
        for node in parents_first(nodes) {
            if let Err(error) = update.visit(&node) {
                update.abort();
                return Err(error);
            }
        }
        Ok(update)
    }

    fn visit(&mut self, node: &Rc<Node>) -> Result<()> {
        let users: Vec<(Rc<Child>, Permissions)> = node
            .parents()
            .into_iter()
            .map(|edge| (edge.clone(), self.permissions_of(&edge)))
            .collect();
        check_conflicts(node, &users)?;
        let together = users
            .iter()
            .fold(Permissions::NONE, |all, (_, one)| all.and(*one));
        let writable = !node.options().read_only;
        let write = Permission::WRITE | Permission::WRITE_UNCHANGED | Permission::RESIZE;
        if !writable && together.required.intersects(write) {
            return Err(Error::new(ErrorKind::Permission, "Block node is read-only"));
        }
        for edge in node.children() {
            let wanted = node
                .driver()
                .child_permissions(edge.role(), together, writable);
            self.edges.push((edge, wanted));
        }
        node.driver().prepare_permissions(together, writable)?;
        self.prepared.push(node.clone());
        Ok(())
    }

    fn permissions_of(&self, edge: &Rc<Child>) -> Permissions {
        let changed = self.edges.iter().find(|(other, _)| Rc::ptr_eq(other, edge));
        changed.map_or(edge.permissions(), |(_, permissions)| *permissions)
    }

    /// What was prepared holds.
    pub(super) fn commit(self) {
        for (edge, permissions) in &self.edges {
            edge.set_permissions(*permissions);
        }
        for node in &self.prepared {
            node.driver().commit_permissions();
        }
    }

    fn abort(self) {
        for node in self.prepared.iter().rev() {
            node.driver().abort_permissions();
        }
    }
}

/// The nodes and all below them; a node comes after every parent of it that is in the list.
fn parents_first(nodes: &[Rc<Node>]) -> Vec<Rc<Node>> {
    let mut order: Vec<Rc<Node>> = Vec::new();
    for node in nodes {
        visit_children_first(node, &mut order);
    }
    order.reverse();
    order
}

fn visit_children_first(node: &Rc<Node>, order: &mut Vec<Rc<Node>>) {
    if order.iter().any(|known| Rc::ptr_eq(known, node)) {
        return;
    }
    for edge in node.children() {
        visit_children_first(&edge.node(), order);
    }
    order.push(node.clone());
}

fn check_conflicts(node: &Node, users: &[(Rc<Child>, Permissions)]) -> Result<()> {
    for (wants, needed) in users {
        for (other, tolerated) in users {
            let refused = needed.required - tolerated.shared;
            if !Rc::ptr_eq(wants, other) && !refused.is_empty() {
                return Err(conflict(node, refused, wants, other));
            }
        }
    }
    Ok(())
}

fn conflict(node: &Node, refused: Permission, wants: &Child, other: &Child) -> Error {
    let name = node.name();
    let message = format!(
        "Permission conflict on node '{name}': permissions '{}' are both required by {} \
         (uses node '{name}' as '{}' child) and unshared by {} (uses node '{name}' as '{}' child).",
        refused.names(),
        wants.parent_description(),
        wants.role().name(),
        other.parent_description(),
        other.role().name(),
    );
    Error::new(ErrorKind::Permission, message)
}
