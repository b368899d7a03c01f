//! The manual pages say what the programs do: liveblk's are made of its command line's definition, liveblkd's
//! names exactly the options that `--help` shows.
//!
//! `LIVEBLK_UPDATE=1 cargo test --test it manual` writes liveblk's pages anew.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use clap_mangen::Man;

use crate::source::root;

fn pages() -> PathBuf {
    root().join("docs/man")
}

/// The page of a command and, after it, those of its subcommands: file name and text.
fn rendered(command: clap::Command, name: &str, all: &mut Vec<(String, String)>) {
    let command = command
        .display_name(name.to_string())
        .disable_help_subcommand(true);
    let subcommands: Vec<clap::Command> = command.get_subcommands().cloned().collect();
    let page = Man::new(command)
        .title(name.to_uppercase())
        .source(format!("liveblk {}", env!("CARGO_PKG_VERSION")))
        .manual("liveblk");
    let mut text = Vec::new();
    page.render(&mut text).expect("written to memory");
    let text = String::from_utf8(text).expect("UTF-8");
    all.push((format!("{name}.1"), text));
    for subcommand in subcommands {
        let name = format!("{name}-{}", subcommand.get_name());
        rendered(subcommand, &name, all);
    }
}

#[test]
fn liveblk_pages_are_made_of_its_command_line() {
    let mut all = Vec::new();
    rendered(liveblk::cli::command(), "liveblk", &mut all);
    assert!(all.len() > 5, "the subcommands have pages too");
    let update = std::env::var_os("LIVEBLK_UPDATE").is_some();
    for (file, text) in &all {
        let path = pages().join(file);
        if update {
            fs::write(&path, text).expect("page written");
        }
        let there = fs::read_to_string(&path).unwrap_or_default();
        let how = "LIVEBLK_UPDATE=1 cargo test --test it manual";
        assert!(
            there == *text,
            "docs/man/{file} is outdated; write it anew by\n{how}"
        );
    }
    let files: BTreeSet<String> = fs::read_dir(pages())
        .expect("docs/man")
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .filter(|file| file.starts_with("liveblk.") || file.starts_with("liveblk-"))
        .collect();
    let wanted = all.into_iter().map(|(file, _)| file).collect();
    assert_eq!(files, wanted, "a page of a command that is gone");
}

#[test]
fn liveblkd_page_has_the_options_of_its_help() {
    let help = Command::new(env!("CARGO_BIN_EXE_liveblkd"))
        .arg("--help")
        .output();
    let help = String::from_utf8(help.expect("liveblkd runs").stdout).expect("UTF-8");
    let page = fs::read_to_string(pages().join("liveblkd.1")).expect("docs/man/liveblkd.1");
    let page = page.replace("\\-", "-");
    let missing: Vec<&str> = options(&help)
        .difference(&options(&page))
        .copied()
        .collect();
    assert!(
        missing.is_empty(),
        "not in docs/man/liveblkd.1: {missing:?}"
    );
    let long = |text| -> BTreeSet<&str> {
        options(text)
            .into_iter()
            .filter(|name| name.starts_with("--"))
            .collect()
    };
    assert_eq!(long(&page), long(&help));
    for name in ["LIVEBLK_LOG", "SIGTERM"] {
        assert!(page.contains(name), "{name}");
    }
}

/// Every `--option` and every `option=` of a suboption.
fn options(text: &str) -> BTreeSet<&str> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    text.split(|c: char| !word(c) && c != '=')
        .filter_map(|piece| match piece.split_once('=') {
            Some((name, _)) => Some(name),
            None => Some(piece).filter(|piece| piece.starts_with("--")),
        })
        .filter(|name| name.len() > 1)
        .collect()
}

#[test]
fn options_are_found_in_any_notation() {
    let found = options("  --export [type=]nbd,id=<id>[,writable=on|off]\n .BI --pidfile path");
    assert_eq!(
        found,
        BTreeSet::from(["--export", "--pidfile", "id", "type", "writable"])
    );
}
