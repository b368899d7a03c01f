//! What a node's options come to: given, inherited, or the default.

use crate::block::{DetectZeroes, DiscardMode, NodeOptions};
use crate::error::Result;

use super::description::SharedOptions;
use super::value::invalid;

/// Where the options that were not given come from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    /// Defaults: a node that stands for itself.
    Defaults,
    /// The `file` child of a node with these options.
    FileOf(NodeOptions),
    /// The `backing` child of a node with these options.
    BackingOf(NodeOptions),
}

impl Source {
    fn options(self) -> NodeOptions {
        let none = NodeOptions::default();
        match self {
            Source::Defaults => none,
            Source::FileOf(parent) => NodeOptions {
                discard: DiscardMode::Unmap,
                detect_zeroes: DetectZeroes::Off,
                ..parent
            },
            Source::BackingOf(parent) => NodeOptions {
                read_only: true,
                force_share: parent.force_share,
                cache_direct: parent.cache_direct,
                cache_no_flush: parent.cache_no_flush,
                ..none
            },
        }
    }
}

/// The options that hold for a node.
///
/// # Errors
/// Options that contradict each other, in QEMU's words.
pub(super) fn resolve(given: &SharedOptions, source: Source) -> Result<NodeOptions> {
    let otherwise = source.options();
    let options = NodeOptions {
        read_only: given.read_only.unwrap_or(otherwise.read_only),
        auto_read_only: given.auto_read_only.unwrap_or(otherwise.auto_read_only),
        force_share: given.force_share.unwrap_or(otherwise.force_share),
        cache_direct: given.cache_direct.unwrap_or(otherwise.cache_direct),
        cache_no_flush: given.cache_no_flush.unwrap_or(otherwise.cache_no_flush),
        discard: given.discard.unwrap_or(otherwise.discard),
        detect_zeroes: given.detect_zeroes.unwrap_or(otherwise.detect_zeroes),
    };
    check(&options)?;
    Ok(options)
}

fn check(options: &NodeOptions) -> Result<()> {
    if options.force_share && !options.read_only {
        return Err(invalid(
            "force-share=on can only be used with read-only images",
        ));
    }
    if options.detect_zeroes == DetectZeroes::Unmap && options.discard != DiscardMode::Unmap {
        return Err(invalid(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to \
             unmap",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: NodeOptions = NodeOptions {
        read_only: false,
        auto_read_only: true,
        force_share: false,
        cache_direct: true,
        cache_no_flush: true,
        discard: DiscardMode::Ignore,
        detect_zeroes: DetectZeroes::On,
    };

    #[test]
    fn a_file_inherits_access_and_cache_but_not_zero_detection() {
        let options = resolve(&SharedOptions::default(), Source::FileOf(PARENT)).expect("valid");
        let expected = NodeOptions {
            discard: DiscardMode::Unmap,
            detect_zeroes: DetectZeroes::Off,
            ..PARENT
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn a_backing_file_is_read_only_unless_told_otherwise() {
        let options = resolve(&SharedOptions::default(), Source::BackingOf(PARENT)).expect("valid");
        assert!(options.read_only && options.cache_direct && !options.auto_read_only);
        let given = SharedOptions {
            read_only: Some(false),
            ..SharedOptions::default()
        };
        let options = resolve(&given, Source::BackingOf(PARENT)).expect("valid");
        assert!(!options.read_only);
    }

    #[test]
    fn contradictions_are_refused() {
        let shared = SharedOptions {
            force_share: Some(true),
            ..SharedOptions::default()
        };
        assert!(resolve(&shared, Source::Defaults).is_err());
        let unmap = SharedOptions {
            detect_zeroes: Some(DetectZeroes::Unmap),
            ..SharedOptions::default()
        };
        assert!(resolve(&unmap, Source::Defaults).is_err());
    }
}
