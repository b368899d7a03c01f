//! The crate's own sources as the layer and style tests read them: text, and text without comments and strings.

use std::fs;
use std::path::{Path, PathBuf};

/// The package's directory.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// One Rust source file.
pub(crate) struct Source {
    /// Path relative to the package, `src/block/mod.rs`.
    pub(crate) path: String,
    /// As it stands in the file.
    pub(crate) text: String,
    /// The same, byte for byte in place, with comments and the contents of strings blanked.
    pub(crate) code: String,
    /// Holds only tests: called `tests.rs` or `x_tests.rs`, or declared under `#[cfg(test)]`.
    is_test: bool,
}

impl Source {
    pub(crate) fn new(path: &str, text: &str) -> Source {
        Source {
            path: path.to_string(),
            text: text.to_string(),
            code: blank_comments_and_strings(text),
            is_test: path.ends_with("tests.rs") || path.contains("/tests/"),
        }
    }

    /// `code` with what stands under `#[cfg(test)]` blanked too.
    pub(crate) fn shipped_code(&self) -> String {
        match self.is_test {
            true => String::new(),
            false => blank_test_items(&self.code),
        }
    }

    /// The module path under the crate: `["block", "child"]`; empty for `lib.rs` and binaries.
    pub(crate) fn module(&self) -> Vec<String> {
        let inner = self.path.trim_start_matches("src/");
        let mut parts: Vec<String> = inner
            .trim_end_matches(".rs")
            .split('/')
            .map(str::to_string)
            .collect();
        if parts
            .last()
            .is_some_and(|last| last == "mod" || inner == "lib.rs")
        {
            parts.pop();
        }
        match parts.first().is_some_and(|first| first == "bin") {
            true => Vec::new(),
            false => parts,
        }
    }
}

/// Every `.rs` file under `src/`, sorted.
pub(crate) fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    walk(&root().join("src"), &mut paths);
    paths.retain(|path| path.extension().is_some_and(|ext| ext == "rs"));
    paths.sort();
    assert!(paths.len() > 10, "the sources were not found");
    let mut sources: Vec<Source> = paths.iter().map(|path| read(path)).collect();
    mark_test_modules(&mut sources);
    sources
}

/// Finds the files of modules that are declared under `#[cfg(test)]`.
fn mark_test_modules(sources: &mut [Source]) {
    let declared: Vec<String> = sources.iter().flat_map(test_modules).collect();
    for source in sources {
        let module = source.module().join("::");
        source.is_test |= declared.contains(&module);
    }
}

/// Paths of the modules that this file declares as `#[cfg(test)] mod x;`.
fn test_modules(source: &Source) -> Vec<String> {
    let words: Vec<&str> = source.code.split_whitespace().collect();
    let after = |window: &[&str]| match window {
        ["#[cfg(test)]", "mod", name] | ["#[cfg(test)]", "pub", "mod", name] => {
            name.strip_suffix(';').map(str::to_string)
        }
        _ => None,
    };
    let names = words.windows(3).chain(words.windows(4)).filter_map(after);
    let module = source.module();
    names
        .map(|name| [&module[..], &[name]].concat().join("::"))
        .collect()
}

/// Every file under `directory`, without version control and build products.
pub(crate) fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("readable directory") {
        let path = entry.expect("directory entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name == ".git" || name == "target" {
            continue;
        }
        match path.is_dir() && !path.is_symlink() {
            true => walk(&path, found),
            false => found.push(path),
        }
    }
}

fn read(path: &Path) -> Source {
    let text = fs::read_to_string(path).expect("source file is UTF-8");
    let relative = path.strip_prefix(root()).expect("below the package");
    Source::new(&relative.to_string_lossy(), &text)
}

/// Line number (from 1) of a byte offset.
pub(crate) fn line_of(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

fn blank_comments_and_strings(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes[at..].starts_with(b"//") => find(bytes, at, b"\n").unwrap_or(bytes.len()),
            b'/' if bytes[at..].starts_with(b"/*") => end_of_block_comment(bytes, at),
            b'"' => {
                let end = end_of_string(bytes, at + 1);
                blank(&mut out, at + 1, end - 1);
                at = end;
                continue;
            }
            b'r' if starts_raw_string(bytes, at) => end_of_raw_string(bytes, at),
            b'\'' => {
                at = end_of_char(bytes, at, &mut out);
                continue;
            }
            _ => {
                at += 1;
                continue;
            }
        };
        blank(&mut out, at, end);
        at = end;
    }
    String::from_utf8(out).expect("blanking whole characters keeps UTF-8")
}

fn blank(out: &mut [u8], from: usize, to: usize) {
    for byte in &mut out[from..to.max(from)] {
        if *byte != b'\n' {
            *byte = b' ';
        }
    }
}

fn find(bytes: &[u8], from: usize, what: &[u8]) -> Option<usize> {
    let position = bytes[from..].windows(what.len()).position(|w| w == what)?;
    Some(from + position)
}

fn end_of_block_comment(bytes: &[u8], start: usize) -> usize {
    let (mut depth, mut at) = (0, start);
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    bytes.len()
}

/// The offset behind the closing quote.
fn end_of_string(bytes: &[u8], mut at: usize) -> usize {
    while at < bytes.len() && bytes[at] != b'"' {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

fn starts_raw_string(bytes: &[u8], at: usize) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let before = at.checked_sub(1).map(|i| bytes[i]).unwrap_or(b' ');
    let hashes = bytes[at + 1..].iter().take_while(|b| **b == b'#').count();
    (before == b'b' || !word(before)) && bytes.get(at + 1 + hashes) == Some(&b'"')
}

fn end_of_raw_string(bytes: &[u8], at: usize) -> usize {
    let hashes = bytes[at + 1..].iter().take_while(|b| **b == b'#').count();
    let close = format!("\"{}", "#".repeat(hashes));
    let end = find(bytes, at + hashes + 2, close.as_bytes());
    end.map_or(bytes.len(), |end| end + close.len())
}

/// Behind a character literal, which is blanked; behind the quote if it opens a lifetime.
fn end_of_char(bytes: &[u8], at: usize, out: &mut [u8]) -> usize {
    let end = match bytes.get(at + 1) {
        Some(b'\\') => find(bytes, at + 3, b"'"),
        _ => find(bytes, at + 2, b"'").filter(|end| {
            let inner = std::str::from_utf8(&bytes[at + 1..*end]);
            inner.is_ok_and(|inner| inner.chars().count() == 1)
        }),
    };
    let Some(end) = end else { return at + 1 };
    blank(out, at + 1, end);
    end + 1
}

/// Blanks each item that follows `#[cfg(test)]`, up to its closing brace or semicolon.
fn blank_test_items(code: &str) -> String {
    let mut out = code.as_bytes().to_vec();
    let mut from = 0;
    while let Some(start) = find(&out, from, b"#[cfg(test)]") {
        let end = end_of_item(&out, start + b"#[cfg(test)]".len());
        blank(&mut out, start, end);
        from = end;
    }
    String::from_utf8(out).expect("blanking whole items keeps UTF-8")
}

fn end_of_item(bytes: &[u8], start: usize) -> usize {
    let mut depth = 0;
    for (offset, byte) in bytes[start..].iter().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            b';' if depth == 0 => return start + offset + 1,
            _ => continue,
        }
        if depth == 0 {
            return start + offset + 1;
        }
    }
    bytes.len()
}

#[test]
fn comments_strings_and_characters_are_blanked_and_lifetimes_are_not() {
    let text = "a /* x /* y */ z */ 'q' \"s\\\"t\" r#\"u\"v\"# // w\n&'static str '\\n' b";
    let code = blank_comments_and_strings(text);
    assert_eq!(code.len(), text.len());
    let words: Vec<&str> = code.split_whitespace().collect();
    assert_eq!(
        words,
        ["a", "'", "'", "\"", "\"", "&'static", "str", "'", "'", "b"]
    );
}

#[test]
fn items_under_cfg_test_are_not_shipped() {
    let source = Source::new(
        "src/x.rs",
        "fn a() {}\n#[cfg(test)]\nmod tests { fn b() { {} } }\nfn c() {}",
    );
    let shipped = source.shipped_code();
    assert!(shipped.contains("fn a") && shipped.contains("fn c") && !shipped.contains("fn b"));
}

#[test]
fn module_paths() {
    let module = |path: &str| Source::new(path, "").module().join("::");
    assert_eq!(module("src/block/mod.rs"), "block");
    assert_eq!(module("src/block/child.rs"), "block::child");
    assert_eq!(module("src/error.rs"), "error");
    assert_eq!(module("src/lib.rs"), "");
    assert_eq!(module("src/bin/liveblk.rs"), "");
}

#[test]
fn modules_declared_for_tests_are_tests() {
    let mut sources = [
        Source::new("src/a/mod.rs", "#[cfg(test)]\nmod fixture;\nmod real;"),
        Source::new("src/a/fixture.rs", "fn f() {}"),
        Source::new("src/a/real.rs", "fn f() {}"),
    ];
    mark_test_modules(&mut sources);
    assert_eq!(sources.map(|source| source.is_test), [false, true, false]);
}
