//! Metadata contexts: which of an export's contexts a client's queries mean.

/// Name of the context that tells what is allocated and what reads as zeroes.
pub const ALLOCATION_CONTEXT: &str = "base:allocation";

/// A context the client selected for `NBD_CMD_BLOCK_STATUS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelectedContext {
    /// The number both sides use for it on this connection.
    pub id: u32,
    /// Its full name.
    pub name: String,
}

/// Contexts among `available` that `NBD_OPT_LIST_META_CONTEXT` names: all without a query, else those a query names in
/// full or by a prefix that ends at a colon.
pub(super) fn list<'a>(available: &'a [String], queries: &[String]) -> Vec<&'a str> {
    let wanted = |name: &str| {
        queries.is_empty()
            || queries
                .iter()
                .any(|query| query == name || is_wildcard(query) && name.starts_with(query))
    };
    available
        .iter()
        .map(String::as_str)
        .filter(|name| wanted(name))
        .collect()
}

/// Contexts that `NBD_OPT_SET_META_CONTEXT` selects: only names in full. Its id is a context's place in `available`.
pub(super) fn select(available: &[String], queries: &[String]) -> Vec<SelectedContext> {
    (0u32..)
        .zip(available)
        .filter(|(_, name)| queries.contains(name))
        .map(|(id, name)| SelectedContext {
            id,
            name: name.clone(),
        })
        .collect()
}

fn is_wildcard(query: &str) -> bool {
    query.ends_with(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn listing_takes_wildcards_and_setting_does_not() {
        let available = names(&[
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:b",
        ]);
        assert_eq!(list(&available, &[]).len(), 3);
        assert_eq!(list(&available, &names(&["base:"])), ["base:allocation"]);
        assert_eq!(list(&available, &names(&["qemu:"])).len(), 2);
        assert_eq!(
            list(&available, &names(&["qemu:dirty-bitmap:"])),
            ["qemu:dirty-bitmap:b"]
        );
        assert_eq!(
            list(&available, &names(&["other:", "base:alloc", ""])),
            [""; 0]
        );

        assert_eq!(select(&available, &[]), []);
        assert_eq!(select(&available, &names(&["qemu:"])), []);
        let selected = select(
            &available,
            &names(&[
                "qemu:dirty-bitmap:b",
                "qemu:dirty-bitmap:b",
                "base:allocation",
            ]),
        );
        assert_eq!(
            selected
                .iter()
                .map(|context| context.id)
                .collect::<Vec<_>>(),
            [0, 2]
        );
    }
}
