//! What a user of a node may do, and what it lets others do.

use bitflags::bitflags;

bitflags! {
    /// Things that can be done with a node. Bit numbers are those of QEMU's image lock bytes.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Permission: u32 {
        /// Read data that is consistent: no one changes it half.
        const CONSISTENT_READ = 1;
        /// Change data.
        const WRITE = 2;
        /// Write what is there already (a job that fills in a copy).
        const WRITE_UNCHANGED = 4;
        /// Change the size.
        const RESIZE = 8;
    }
}

impl Permission {
    /// The names of the flags that are set, as QMP spells them in messages.
    pub fn names(self) -> String {
        let name = |flag: Permission| match flag {
            Permission::CONSISTENT_READ => "consistent read",
            Permission::WRITE => "write",
            Permission::WRITE_UNCHANGED => "write unchanged",
            _ => "resize",
        };
        self.iter().map(name).collect::<Vec<_>>().join(", ")
    }
}

/// Permissions of an edge, or of all edges to a node taken together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// What is needed.
    pub required: Permission,
    /// What others may have.
    pub shared: Permission,
}

impl Permissions {
    /// Needs nothing and tolerates everything: the permissions of no users.
    pub const NONE: Permissions = Permissions {
        required: Permission::empty(),
        shared: Permission::all(),
    };

    /// What two users need together, and what both tolerate.
    pub fn and(self, other: Permissions) -> Permissions {
        Permissions {
            required: self.required | other.required,
            shared: self.shared & other.shared,
        }
    }

    /// For the `file` child of a format: metadata is read always, and written whenever the image
    /// was opened for writing, with or without users. Users to whom the content is a mixture let nobody
    /// else read it either.
    pub fn for_format_file(self, writable: bool) -> Permissions {
        let unchanged = self.required & Permission::WRITE_UNCHANGED;
        let write = Permission::WRITE | Permission::RESIZE | unchanged;
        let required = if writable { write } else { Permission::empty() };
        Permissions {
            required: Permission::CONSISTENT_READ | required,
            shared: Permission::WRITE_UNCHANGED | (self.shared & Permission::CONSISTENT_READ),
        }
    }

    /// For a `backing` child: only read, where this node's own users read; others may do what these allow.
    pub fn for_backing(self) -> Permissions {
        let mut shared = Permission::CONSISTENT_READ | Permission::WRITE_UNCHANGED;
        if self.shared.contains(Permission::WRITE) {
            shared |= Permission::WRITE | Permission::RESIZE;
        }
        Permissions {
            required: self.required & Permission::CONSISTENT_READ,
            shared,
        }
    }

    /// For the child of a filter, and of a raw image without offset and size: what the users have.
    pub fn for_filter(self) -> Permissions {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_messages() {
        let both = Permission::WRITE | Permission::RESIZE;
        assert_eq!(both.names(), "write, resize");
    }

    #[test]
    fn users_together_need_the_union_and_share_the_intersection() {
        let reader = Permissions {
            required: Permission::CONSISTENT_READ,
            shared: Permission::all() - Permission::RESIZE,
        };
        let writer = Permissions {
            required: Permission::WRITE,
            shared: Permission::all(),
        };
        let both = reader.and(writer).and(Permissions::NONE);
        assert_eq!(
            both.required,
            Permission::CONSISTENT_READ | Permission::WRITE
        );
        assert_eq!(both.shared, Permission::all() - Permission::RESIZE);
    }
}
