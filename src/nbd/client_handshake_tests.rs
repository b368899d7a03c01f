use proptest::prelude::*;

use super::*;
use crate::nbd::{BlockSizes, Catalog, ExportInfo, Handshake, Step};

struct One;

impl Catalog for One {
    fn list(&self) -> Vec<(String, Option<String>)> {
        Vec::new()
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        (name == "disk").then(|| ExportInfo {
            description: Some("a disk".into()),
            size: 8 << 20,
            read_only: false,
            multi_conn: true,
            block_sizes: BlockSizes {
                minimum: 512,
                preferred: 4096,
            },
            contexts: vec!["other:x".into(), ALLOCATION_CONTEXT.into()],
        })
    }
}

/// Both sides talk until one of them is done; what the server said, and what came of it.
fn talk(export: &str) -> (Vec<u8>, Result<Terms>) {
    let (mut server, mut client) = (Handshake::new(), ClientHandshake::new(export));
    let mut said = Vec::new();
    loop {
        while server.step(&One) == Step::Answered {}
        let bytes = server.take_output();
        client.input(&bytes);
        said.extend(bytes);
        loop {
            match client.step() {
                Ok(ClientStep::Enter(terms)) => return (said, Ok(terms)),
                Ok(ClientStep::Proceed) => {}
                Ok(ClientStep::Receive) => break,
                Err(error) => return (said, Err(error)),
            }
        }
        let output = client.take_output();
        assert!(!output.is_empty(), "both wait");
        server.input(&output);
    }
}

/// What a client makes of these bytes, in pieces.
fn hear(bytes: &[u8], piece: usize) -> Result<Option<Terms>, String> {
    let mut client = ClientHandshake::new("disk");
    for piece in bytes.chunks(piece) {
        client.input(piece);
        loop {
            match client.step() {
                Ok(ClientStep::Enter(terms)) => return Ok(Some(terms)),
                Ok(ClientStep::Proceed) => {}
                Ok(ClientStep::Receive) => break,
                Err(error) => return Err(error.to_string()),
            }
        }
    }
    Ok(None)
}

#[test]
fn terms_are_found_with_our_own_server() {
    let terms = talk("disk").1.expect("terms");
    assert_eq!(terms.size, 8 << 20);
    assert_eq!(terms.mode, ReplyMode::Structured);
    assert!(terms.allocation.is_some());
    let blocks = terms.blocks.expect("announced");
    assert_eq!((blocks.minimum, blocks.preferred), (512, 4096));
    let error = talk("nosuch").1.expect_err("no such export");
    assert_eq!(error.message(), "Requested export not available");
}

/// Cut anywhere it waits for more; it is never content with less.
#[test]
fn each_byte_of_the_servers_counts() {
    let said = talk("disk").0;
    for length in 0..said.len() {
        assert_eq!(hear(&said[..length], 3), Ok(None), "{length}");
    }
    assert!(matches!(hear(&said, 1), Ok(Some(_))));
    let more = [&said[..], b"x"].concat();
    assert!(hear(&more, more.len()).is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_dealt_with(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        piece in 1usize..40,
    ) {
        let mut said = talk("disk").0;
        for (index, byte) in changes {
            let at = index.index(said.len());
            said[at] = byte;
        }
        // Whatever it is, terms make sense.
        if let Ok(Some(terms)) = hear(&said, piece) {
            prop_assert!(terms.size <= i64::MAX as u64);
            if let Some(blocks) = terms.blocks {
                prop_assert!(blocks.minimum.is_power_of_two() && blocks.minimum <= 64 << 10);
                prop_assert!(terms.size.is_multiple_of(u64::from(blocks.minimum)));
            }
        }
    }
}
