use proptest::prelude::*;
use serde_json::json;

use super::*;

fn read(chunks: &[&[u8]]) -> Vec<Result<Value, JsonError>> {
    let mut reader = Reader::default();
    for chunk in chunks {
        reader.feed(chunk);
    }
    std::iter::from_fn(|| reader.next_message()).collect()
}

fn error_of(text: &[u8]) -> String {
    match &read(&[text])[..] {
        [Err(JsonError(text))] => text.clone(),
        other => panic!("expected one error, found {other:?}"),
    }
}

#[test]
fn values_of_all_kinds_are_read() {
    let text = br#"{"a": [1, -2, 18446744073709551615, 1.5, true, false, null, "x"], 'b': {}}"#;
    let value = json!({"a": [1, -2, u64::MAX, 1.5, true, false, null, "x"], "b": {}});
    assert_eq!(read(&[text]), [Ok(value)]);
}

#[test]
fn messages_need_no_separator() {
    assert_eq!(read(&[b"{}{}[]"]).len(), 3);
    assert_eq!(read(&[b"5"]).len(), 0, "a number may go on");
    assert_eq!(read(&[b"5", b" "]), [Ok(json!(5))]);
}

#[test]
fn escapes_and_quotes() {
    let text = br#"["\u00e9\ud83d\ude00\u0000\/\'", 'a"b', "c'd"]"#;
    assert_eq!(
        read(&[text]),
        [Ok(json!(["\u{e9}\u{1f600}\0/'", "a\"b", "c'd"]))]
    );
}

/// Each line was put to qemu-storage-daemon 10.0.2, which answered with these texts.
#[test]
fn errors_are_worded_as_qemu_words_them() {
    for (input, text) in [
        (&b"nonsense\n"[..], "invalid keyword 'nonsense'"),
        (b"{\"x\": tru}\n", "invalid keyword 'tru'"),
        (b"{,}\n", "expecting value"),
        (b"[1,]\n", "expecting value"),
        (b"}\n", "expecting value"),
        (b"{\"a\":1 \"b\":2}\n", "expected separator in dict"),
        (b"[1 2]\n", "expected separator in list"),
        (b"[1}\n", "expected separator in list"),
        (b"{\"a\"}\n", "missing : in object pair"),
        (b"{[1]:2}\n", "key is not a string in object"),
        (b"[{\"a\":1,\"a\":2}]\n", "duplicate key"),
        (b"\"\\x\"\n", "invalid escape sequence in string"),
        (b"\"\\u12\"\n", "\\u12\" is not a valid Unicode character"),
        (
            b"\"\\ud800\\u0041\"\n",
            "\\ud800 is not a valid Unicode character",
        ),
        (b"\"\\uffff\"\n", "\\uffff is not a valid Unicode character"),
        (b"\"a\xc3b\"\n", "invalid UTF-8 sequence in string"),
        (b"\"\xed\xa0\x80\"\n", "invalid UTF-8 sequence in string"),
        (b"01\n", "stray '01'"),
        (b"-\n", "stray '-\n'"),
        (b"1e+\n", "stray '1e+\n'"),
        (b"NaN\n", "stray 'N'"),
        (b"\"abc\n", "stray '\"abc\n'"),
        (b"\x00\n", "stray ''"),
        (b"\xffabc\n", "stray '\u{fffd}'"),
    ] {
        assert_eq!(
            error_of(input),
            format!("JSON parse error, {text}"),
            "{input:?}"
        );
    }
}

#[test]
fn garbage_is_dropped_up_to_a_structural_or_control_character() {
    let results = read(&[b"@abc\t \"dropped\" {\"a\": 1}"]);
    assert_eq!(results.len(), 2);
    assert_eq!(results[1], Ok(json!({"a": 1})));
    let results = read(&[b"{\"execute\": \"query-ver\xff\n{}"]);
    assert_eq!(results.len(), 2);
    assert_eq!(results[1], Ok(json!({})));
}

#[test]
fn limits_are_kept() {
    let limits = Limits {
        token_bytes: 10,
        tokens: 6,
        nesting: 2,
    };
    for (text, expected) in [
        ("[[[", "JSON nesting depth limit exceeded"),
        ("[1,1,1,1", "JSON token count limit exceeded"),
        ("\"0123456789\"", "JSON token size limit exceeded"),
    ] {
        let mut reader = Reader::with_limits(limits);
        reader.feed(text.as_bytes());
        assert_eq!(reader.next_message(), Some(Err(JsonError(expected.into()))));
    }
}

#[test]
fn a_whole_text_is_one_value() {
    assert_eq!(parse("{'a': 1}"), Ok(json!({"a": 1})));
    let error = |text| parse(text).unwrap_err().0;
    assert_eq!(error("{"), "JSON parse error, premature EOI");
    assert_eq!(error("{} x"), "Expecting at most one JSON value");
    assert_eq!(error(" "), "Expecting a JSON value");
}

#[test]
fn a_line_is_ascii_and_ends_with_cr_lf() {
    let value = json!({"a": [], "b": [1, {"c": "\u{e9}\n\u{1f600}\""}], "d": {}});
    let line = String::from_utf8(write(&value, Style::Line)).unwrap();
    assert_eq!(
        line,
        "{\"a\": [], \"b\": [1, {\"c\": \"\\u00E9\\n\\uD83D\\uDE00\\\"\"}], \"d\": {}}\r\n"
    );
}

#[test]
fn pretty_output_indents_by_four() {
    let text = String::from_utf8(write(&json!({"a": {}, "b": [1, 2]}), Style::Pretty)).unwrap();
    assert_eq!(
        text.split("\r\n").collect::<Vec<_>>(),
        [
            "{",
            "    \"a\": {",
            "    },",
            "    \"b\": [",
            "        1,",
            "        2",
            "    ]",
            "}",
            ""
        ]
    );
}

proptest! {
    #[test]
    fn any_bytes_in_any_chunks_give_the_same_result(
        bytes in proptest::collection::vec(
            prop_oneof![any::<u8>(), proptest::sample::select(b"{}[],:\"'\\u0 \n\xff-1.etrualsn".to_vec())], 0..200),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let whole = read(&[&bytes]);
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        at.extend([0, bytes.len()]);
        at.sort_unstable();
        let chunks: Vec<&[u8]> = at.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
        prop_assert_eq!(read(&chunks), whole);
    }

    #[test]
    fn what_is_written_is_read_back(text in any::<String>(), number in any::<i64>(), pretty in any::<bool>()) {
        prop_assume!(!text.chars().any(|c| { let c = c as u32; (0xfdd0..=0xfdef).contains(&c) || c & 0xfffe == 0xfffe }));
        let value = json!({"t": [text.clone()], text: number});
        let style = if pretty { Style::Pretty } else { Style::Line };
        prop_assert_eq!(read(&[&write(&value, style)]), [Ok(value)]);
    }
}
