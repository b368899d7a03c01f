use proptest::prelude::*;

use super::*;
use crate::nbd::protocol::{OPTION_REPLY_MAGIC, TransmissionFlags};
use crate::nbd::session::{BlockSizes, ExportInfo};

/// One export "disk", writable, of 8 MiB; and "ro".
struct Two;

impl Catalog for Two {
    fn list(&self) -> Vec<(String, Option<String>)> {
        vec![("disk".into(), Some("a disk".into())), ("ro".into(), None)]
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        ["disk", "ro"].contains(&name).then(|| ExportInfo {
            description: (name == "disk").then(|| "a disk".into()),
            size: 8 << 20,
            read_only: name == "ro",
            multi_conn: true,
            block_sizes: BlockSizes {
                minimum: 1,
                preferred: 4096,
            },
            contexts: vec!["base:allocation".into()],
        })
    }
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::from(OPTION_MAGIC.to_be_bytes());
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn name_field(name: &str) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes()[..], name.as_bytes()].concat()
}

/// A handshake past the client's flags, its output taken.
fn begun(flags: u32) -> Handshake {
    let mut handshake = Handshake::new();
    handshake.input(&flags.to_be_bytes());
    assert_eq!(handshake.step(&Two), Step::Answered);
    assert_eq!(handshake.take_output().len(), 18);
    handshake
}

/// Steps until input is wanted or the handshake is over.
fn run(handshake: &mut Handshake) -> Step {
    run_with(handshake, &Two)
}

fn run_with(handshake: &mut Handshake, catalog: &dyn Catalog) -> Step {
    loop {
        let step = handshake.step(catalog);
        if step != Step::Answered {
            return step;
        }
    }
}

/// Sends an option that is answered, and gives the type of the last reply.
fn last_reply(handshake: &mut Handshake, number: u32, data: &[u8]) -> u32 {
    handshake.input(&option(number, data));
    assert_eq!(run(handshake), Step::Receive);
    let mut output = &handshake.take_output()[..];
    loop {
        assert_eq!(be_u64(output, 0), OPTION_REPLY_MAGIC);
        assert_eq!(be_u32(output, 8), number);
        let reply = be_u32(output, 12);
        output = &output[20 + be_u32(output, 16) as usize..];
        if output.is_empty() {
            return reply;
        }
    }
}

#[test]
fn export_name_enters_with_and_without_zeroes() {
    for (flags, length) in [(1, 134), (3, 10), (0, 134)] {
        let mut handshake = begun(flags);
        handshake.input(&option(opt::EXPORT_NAME, b"ro"));
        handshake.input(b"tail");
        let Step::Enter(session) = run(&mut handshake) else {
            panic!("not entered")
        };
        assert_eq!(session.mode, ReplyMode::Simple);
        assert!(session.flags.contains(TransmissionFlags::READ_ONLY));
        assert_eq!(handshake.take_output().len(), length);
        assert_eq!(handshake.into_rest(), b"tail");
    }
}

#[test]
fn transmission_flags_are_those_of_qemu() {
    let flags = |name, mode| Two.find(name).unwrap().transmission_flags(mode).bits();
    assert_eq!(flags("disk", ReplyMode::Extended), 0x1ded);
    assert_eq!(flags("ro", ReplyMode::Extended), 0x158f);
    assert_eq!(flags("disk", ReplyMode::Structured), 0x0ded);
    assert_eq!(flags("disk", ReplyMode::Simple), 0x0d6d);
    let single = ExportInfo {
        multi_conn: false,
        ..Two.find("disk").unwrap()
    };
    assert_eq!(
        single.transmission_flags(ReplyMode::Extended).bits(),
        0x1ced
    );
}

#[test]
fn options_that_cannot_be_had_are_refused_and_the_handshake_goes_on() {
    let mut handshake = begun(3);
    for (number, data, reply) in [
        (4, &b""[..], rep::ERR_UNSUP),
        (4, b"junk", rep::ERR_UNSUP),
        (opt::STARTTLS, b"", rep::ERR_POLICY),
        (opt::STARTTLS, b"x", rep::ERR_INVALID),
        (opt::LIST, b"x", rep::ERR_INVALID),
        (opt::GO, b"\0\0\0\x09disk\0\0", rep::ERR_INVALID),
        (opt::GO, b"\0\0\0\x04none\0\0", rep::ERR_UNKNOWN),
        (opt::INFO, b"\0\0\0\0\0\0", rep::ERR_UNKNOWN),
        (
            opt::SET_META_CONTEXT,
            b"\0\0\0\x04disk\0\0\0\0",
            rep::ERR_INVALID,
        ),
        (opt::STRUCTURED_REPLY, b"x", rep::ERR_INVALID),
        (opt::STRUCTURED_REPLY, b"", rep::ACK),
        (opt::STRUCTURED_REPLY, b"", rep::ERR_INVALID),
        (opt::EXTENDED_HEADERS, b"", rep::ACK),
        (opt::STRUCTURED_REPLY, b"", rep::ERR_EXT_HEADER_REQD),
        (opt::SET_META_CONTEXT, b"\0\0\0\x04disk\0\0\0\0", rep::ACK),
        (opt::LIST, b"", rep::ACK),
        (opt::INFO, b"\0\0\0\x04disk\0\0", rep::ACK),
    ] {
        assert_eq!(
            last_reply(&mut handshake, number, data),
            reply,
            "option {number} {data:?}"
        );
    }
}

#[test]
fn too_long_options_are_skipped_and_refused() {
    let mut handshake = begun(3);
    let data = vec![0; MAX_OPTION_LENGTH + 1];
    assert_eq!(last_reply(&mut handshake, opt::GO, &data), rep::ERR_TOO_BIG);
    assert_eq!(last_reply(&mut handshake, opt::LIST, b""), rep::ACK);
}

#[test]
fn violations_close() {
    let closes = |flags: u32, bytes: &[u8]| {
        let mut handshake = begun(flags);
        handshake.input(bytes);
        matches!(run(&mut handshake), Step::Close(CloseReason::Violation(_)))
    };
    assert!(closes(3, &[0; 16]));
    assert!(closes(2, &option(opt::LIST, b"")));
    assert!(closes(
        3,
        &option(opt::EXPORT_NAME, &[b'x'; MAX_STRING_LENGTH + 1])
    ));
    let mut huge = option(opt::LIST, b"");
    huge[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(closes(3, &huge));

    let mut handshake = Handshake::new();
    handshake.input(&4u32.to_be_bytes());
    assert!(matches!(
        handshake.step(&Two),
        Step::Close(CloseReason::Violation(_))
    ));
    let mut handshake = begun(3);
    handshake.input(&option(opt::EXPORT_NAME, b"none"));
    assert_eq!(run(&mut handshake), Step::Close(CloseReason::UnknownExport));
}

#[test]
fn abort_is_acknowledged_even_with_data() {
    let mut handshake = begun(3);
    handshake.input(&option(opt::ABORT, b"bye"));
    assert_eq!(run(&mut handshake), Step::Close(CloseReason::Aborted));
    assert_eq!(handshake.take_output().len(), 20);
}

#[test]
fn contexts_count_only_for_the_export_they_were_selected_for() {
    let query = [&1u32.to_be_bytes()[..], &name_field("base:allocation")].concat();
    for (selected_for, contexts) in [("disk", 1), ("ro", 0)] {
        let mut handshake = begun(3);
        last_reply(&mut handshake, opt::STRUCTURED_REPLY, b"");
        let data = [name_field(selected_for), query.clone()].concat();
        assert_eq!(
            last_reply(&mut handshake, opt::SET_META_CONTEXT, &data),
            rep::ACK
        );
        handshake.input(&option(opt::GO, &[name_field("disk"), vec![0; 2]].concat()));
        let Step::Enter(session) = run(&mut handshake) else {
            panic!("not entered")
        };
        assert_eq!(session.contexts.len(), contexts);
    }
}

/// Bytes that look a little like options, so that the deeper layers are reached.
/// An export "disk" that offers these contexts.
struct Offering(&'static [&'static str]);

impl Catalog for Offering {
    fn list(&self) -> Vec<(String, Option<String>)> {
        Two.list()
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        let contexts = self.0.iter().map(|name| name.to_string()).collect();
        Two.find(name).map(|info| ExportInfo { contexts, ..info })
    }
}

/// An export that has gone, and another one under its name: the daemon ended when the client asked for a context that
/// the new one did not have.
#[test]
fn contexts_do_not_count_for_another_export_of_the_same_name() {
    let before = Offering(&["base:allocation", "qemu:dirty-bitmap:b"]);
    let selection = [
        name_field("disk"),
        1u32.to_be_bytes().to_vec(),
        name_field("qemu:dirty-bitmap:b"),
    ]
    .concat();
    let go = [name_field("disk"), vec![0, 0]].concat();
    for (now, contexts) in [
        (&["base:allocation", "qemu:dirty-bitmap:b"][..], 1),
        (&["base:allocation", "qemu:dirty-bitmap:c"], 0),
        (&["base:allocation"], 0),
    ] {
        let mut handshake = begun(3);
        handshake.input(
            &[
                option(opt::STRUCTURED_REPLY, b""),
                option(opt::SET_META_CONTEXT, &selection),
            ]
            .concat(),
        );
        assert_eq!(run_with(&mut handshake, &before), Step::Receive);
        handshake.input(&option(opt::GO, &go));
        let Step::Enter(session) = run_with(&mut handshake, &Offering(now)) else {
            panic!("{now:?}");
        };
        assert_eq!(session.contexts.len(), contexts, "{now:?}");
    }
}

fn optionish() -> impl Strategy<Value = Vec<u8>> {
    let data = prop::collection::vec(prop_oneof![Just(0u8), Just(4u8), any::<u8>()], 0..40);
    let one = (0u32..13, data).prop_map(|(number, data)| option(number, &data));
    prop_oneof![
        4 => prop::collection::vec(one, 0..8).prop_map(|options| options.concat()),
        1 => prop::collection::vec(any::<u8>(), 0..200),
    ]
}

proptest! {
    #[test]
    fn any_input_in_any_chunks_gives_the_same_answers(bytes in optionish(), cuts in prop::collection::vec(1usize..40, 0..60)) {
        let whole = answers(&bytes, &[]);
        let pieces = answers(&bytes, &cuts);
        prop_assert_eq!(whole, pieces);
    }
}

/// All output and the end of a handshake fed in pieces of the given lengths.
fn answers(bytes: &[u8], cuts: &[usize]) -> (Vec<u8>, Step) {
    let mut handshake = begun(3);
    let mut output = Vec::new();
    let mut rest = bytes;
    let mut cuts = cuts.iter();
    loop {
        let step = run(&mut handshake);
        output.extend(handshake.take_output());
        if step != Step::Receive || rest.is_empty() {
            return (output, step);
        }
        let length = cuts.next().copied().unwrap_or(rest.len()).min(rest.len());
        handshake.input(&rest[..length]);
        rest = &rest[length..];
    }
}
