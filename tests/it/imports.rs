//! Which paths of a source text pass the crate's root: `crate::…` and `super::…` chains that climb to the top,
//! in `use` groups and in the middle of code.

/// Every import that passes the crate's root: offset and `layer` or `layer::module`. `depth` is the file's module depth.
pub(crate) fn imports(code: &str, depth: usize) -> Vec<(usize, String)> {
    let tokens = tokens(code);
    let mut found = Vec::new();
    let mut inline = InlineModules::default();
    let mut at = 0;
    while at < tokens.len() {
        inline.see(&tokens, at);
        let here = depth + inline.depth();
        let behind = match tokens[at].1 {
            "crate" => Some(at + 1),
            "super" => reaches_root(&tokens, at, here),
            _ => None,
        };
        match behind {
            Some(next) if is(&tokens, next, "::") => {
                heads(&tokens, next + 1, None, &mut found);
                at = next + 1;
            }
            _ => at += 1,
        }
    }
    found
}

/// Follows `super::super…`: where the chain ends, if it ends at the crate's root.
fn reaches_root(tokens: &[(usize, &str)], at: usize, depth: usize) -> Option<usize> {
    if at > 0 && tokens[at - 1].1 == "::" {
        return None; // inside a chain that was judged at its start
    }
    let mut supers = 1;
    let mut end = at + 1;
    while is(tokens, end, "::") && is(tokens, end + 1, "super") {
        supers += 1;
        end += 2;
    }
    (supers >= depth).then_some(end)
}

/// Collects what a path or a group of paths names first (and second).
fn heads(
    tokens: &[(usize, &str)],
    at: usize,
    prefix: Option<&str>,
    found: &mut Vec<(usize, String)>,
) -> usize {
    let Some((offset, head)) = tokens.get(at) else {
        return at;
    };
    if *head == "{" {
        return group(tokens, at, prefix, found);
    }
    let two_levels = prefix.is_none() && is(tokens, at + 1, "::") && may_name_module(head);
    if two_levels {
        return heads(tokens, at + 2, Some(head), found);
    }
    let target = match (prefix, *head) {
        (Some(layer), "self" | "*") => layer.to_string(),
        (Some(layer), inner) => format!("{layer}::{inner}"),
        (None, head) => head.to_string(),
    };
    found.push((*offset, target));
    at + 1
}

fn group(
    tokens: &[(usize, &str)],
    open: usize,
    prefix: Option<&str>,
    found: &mut Vec<(usize, String)>,
) -> usize {
    let mut at = open + 1;
    while at < tokens.len() && tokens[at].1 != "}" {
        at = heads(tokens, at, prefix, found);
        at = end_of_member(tokens, at);
    }
    at + 1
}

/// The start of the group's next member, or its closing brace.
fn end_of_member(tokens: &[(usize, &str)], mut at: usize) -> usize {
    let mut depth = 0;
    while let Some((_, token)) = tokens.get(at) {
        match *token {
            "{" => depth += 1,
            "}" if depth == 0 => return at,
            "}" => depth -= 1,
            "," if depth == 0 => return at + 1,
            _ => {}
        }
        at += 1;
    }
    at
}

fn may_name_module(head: &str) -> bool {
    head.starts_with(|c: char| c.is_ascii_lowercase())
}

fn is(tokens: &[(usize, &str)], at: usize, what: &str) -> bool {
    tokens.get(at).is_some_and(|token| token.1 == what)
}

/// How many `mod x { … }` the place is in.
#[derive(Default)]
struct InlineModules {
    braces: usize,
    opened_at: Vec<usize>,
}

impl InlineModules {
    fn see(&mut self, tokens: &[(usize, &str)], at: usize) {
        match tokens[at].1 {
            "{" => {
                if at >= 2 && tokens[at - 2].1 == "mod" {
                    self.opened_at.push(self.braces);
                }
                self.braces += 1;
            }
            "}" => {
                self.braces = self.braces.saturating_sub(1);
                self.opened_at.retain(|level| *level < self.braces);
            }
            _ => {}
        }
    }

    fn depth(&self) -> usize {
        self.opened_at.len()
    }
}

/// Words, `::`, and every other visible character by itself.
pub(crate) fn tokens(code: &str) -> Vec<(usize, &str)> {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(first) = code[at..].chars().next() {
        let length = match first {
            c if word(c) => code[at..].find(|c| !word(c)).unwrap_or(code.len() - at),
            ':' if code[at..].starts_with("::") => 2,
            other => other.len_utf8(),
        };
        if !first.is_whitespace() {
            found.push((at, &code[at..at + length]));
        }
        at += length;
    }
    found
}
