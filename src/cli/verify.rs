//! `liveblk backup verify`: does a backup hold what it is to hold?
//!
//! Two disks, each an image with its backing files or an export of an NBD server, are read side by side, a MiB
//! after the other with several on their way; comparing and hashing is done by helper threads. What is known to be
//! zero is not read.

use std::collections::VecDeque;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::block::{Child, ExtentKind, Graph, Permission, Permissions};
use crate::blockdev::{Blockdev, NbdDescription};
use crate::buffer::MemorySlice;
use crate::error::{Error, Result};
use crate::range::ByteRange;
use crate::runtime::{Config, Handle, Runtime, Task};

use super::Outcome;
use super::args::Output;
use super::backup_args::VerifyArguments;
use super::format::Format;
use super::job_progress::Display;
use super::job_view::JobView;

/// Bytes that are hashed by themselves: part of what a digest means.
const CHUNK: u64 = 1 << 20;
/// Chunks on their way.
const MOST: usize = 8;
/// Differing ranges that are told.
const MOST_TOLD: usize = 20;
/// No progress is shown before.
const SILENT: Duration = Duration::from_secs(1);
/// Exit status where the two differ.
const DIFFERENT: u8 = 3;

pub(super) fn run(arguments: &VerifyArguments) -> Result<Outcome> {
    let runtime = Runtime::new(&Config::default())?;
    let handle = runtime.handle();
    let verdict = runtime.block_on(verify(&handle, arguments))?;
    let text = match arguments.output {
        Output::Json => format!("{:#}\n", verdict.json()),
        Output::Human => verdict.text(),
    };
    let status = if verdict.is_good() { 0 } else { DIFFERENT };
    Ok(Outcome { text, status })
}

async fn verify(handle: &Handle, arguments: &VerifyArguments) -> Result<Verdict> {
    let blockdev = Blockdev::new(handle, &Graph::new());
    let mut disks =
        vec![Disk::open(&blockdev, "backup", &arguments.backup, arguments.format).await?];
    if let Some(moment) = &arguments.moment {
        disks.push(Disk::open(&blockdev, "moment", moment, arguments.moment_format).await?);
    }
    let mut comparison = Comparison::new(handle, &disks);
    let compared = comparison.run().await;
    let verdict = compared.map(|()| comparison.verdict(&disks, arguments.digest.as_deref()));
    for disk in &disks {
        blockdev.graph().detach(&disk.edge).await?;
    }
    blockdev.close_all().await?;
    verdict
}

/// One of the two.
struct Disk {
    name: String,
    edge: Rc<Child>,
}

impl Disk {
    async fn open(
        blockdev: &Blockdev,
        node_name: &str,
        name: &str,
        declared: Option<Format>,
    ) -> Result<Disk> {
        let format = match declared {
            None if NbdDescription::of_name(name).is_some() => Format::Raw,
            declared => Format::of(Path::new(name), declared)?,
        };
        let in_context = |error: Error| error.context(name);
        let node = blockdev
            .add_read_only(node_name, name, format.name())
            .await
            .map_err(in_context)?;
        let permissions = Permissions {
            required: Permission::CONSISTENT_READ,
            shared: Permission::CONSISTENT_READ | Permission::WRITE_UNCHANGED,
        };
        let edge = blockdev
            .graph()
            .attach_root("verify", &node, permissions)
            .map_err(in_context)?;
        Ok(Disk {
            name: name.to_owned(),
            edge,
        })
    }

    fn size(&self) -> u64 {
        self.edge.node().size()
    }
}

/// What came of a chunk: the hash of each disk's, from where to where they differ, and in how many bytes.
struct Compared {
    hashes: Vec<[u8; 32]>,
    difference: Option<ByteRange>,
    differing: u64,
}

/// A comparison under way.
struct Comparison {
    handle: Handle,
    edges: Vec<Rc<Child>>,
    /// Up to the end of the longest disk.
    end: u64,
    digests: Vec<Sha256>,
    differences: Vec<ByteRange>,
    /// Bytes that differ.
    differing: u64,
}

impl Comparison {
    fn new(handle: &Handle, disks: &[Disk]) -> Comparison {
        Comparison {
            handle: handle.clone(),
            edges: disks.iter().map(|disk| disk.edge.clone()).collect(),
            end: disks.iter().map(Disk::size).max().unwrap_or(0),
            digests: disks.iter().map(|_| Sha256::new()).collect(),
            differences: Vec::new(),
            differing: 0,
        }
    }

    async fn run(&mut self) -> Result<()> {
        let started = self.handle.now();
        let mut display: Option<Display> = None;
        let mut under_way: VecDeque<Task<Result<Compared>>> = VecDeque::new();
        let (mut begun, mut ended) = (0, 0);
        while ended < self.end {
            while begun < self.end && under_way.len() < MOST {
                let next = ByteRange::between(begun, self.end.min(begun + CHUNK));
                under_way.push_back(self.handle.spawn(compare(
                    self.handle.clone(),
                    self.edges.clone(),
                    next,
                )));
                begun = next.end();
            }
            let Some(task) = under_way.pop_front() else {
                unreachable!("what has begun and has not ended is under way");
            };
            let compared = task.await;
            if compared.is_err() {
                // Nothing reads on when the disks are closed.
                for task in under_way {
                    let _ = task.await;
                }
                end(display.as_ref());
                return compared.map(drop);
            }
            self.add(ended, compared?);
            ended = self.end.min(ended + CHUNK);
            let elapsed = self.handle.now() - started;
            if elapsed >= SILENT {
                let display = display.get_or_insert_with(Display::new);
                display.show(elapsed, &progress(ended, self.end));
            }
        }
        end(display.as_ref());
        Ok(())
    }

    fn add(&mut self, start: u64, compared: Compared) {
        let parts = self
            .digests
            .iter_mut()
            .zip(&self.edges)
            .zip(compared.hashes);
        for ((digest, edge), hash) in parts {
            if start < edge.node().size() {
                digest.update(hash);
            }
        }
        let Some(new) = compared.difference else {
            return;
        };
        self.differing += compared.differing;
        let has_room = self.differences.len() < MOST_TOLD;
        match self.differences.last_mut() {
            Some(last) if last.end() == new.start() => {
                *last = ByteRange::between(last.start(), new.end());
            }
            _ if has_room => self.differences.push(new),
            _ => {}
        }
    }

    fn verdict(self, disks: &[Disk], wanted: Option<&str>) -> Verdict {
        let digests = self
            .digests
            .into_iter()
            .map(|digest| hex(&digest.finalize()));
        let sides = disks.iter().zip(digests).map(|(disk, digest)| Side {
            name: disk.name.clone(),
            size: disk.size(),
            digest,
        });
        Verdict {
            sides: sides.collect(),
            wanted: wanted.map(str::to_owned),
            differences: self.differences,
            differing: self.differing,
        }
    }
}

fn end(display: Option<&Display>) {
    if let Some(display) = display {
        display.end();
    }
}

/// The progress as jobs show theirs.
fn progress(current: u64, total: u64) -> JobView {
    JobView {
        id: "verify".to_owned(),
        kind: "verify".to_owned(),
        status: "running".to_owned(),
        current,
        total,
        error: None,
        block: None,
    }
}

/// Reads a range of every disk, and compares. What lies past the end of a shorter one differs.
async fn compare(handle: Handle, edges: Vec<Rc<Child>>, range: ByteRange) -> Result<Compared> {
    let mut parts = Vec::with_capacity(edges.len());
    for edge in &edges {
        parts.push(read(edge, range).await?);
    }
    Ok(handle
        .blocking(move || hash_and_compare(range, &parts))
        .await)
}

/// The bytes of a range, as far as the disk goes.
async fn read(edge: &Child, range: ByteRange) -> Result<Vec<u8>> {
    let end = range.end().min(edge.node().size());
    if end <= range.start() {
        return Ok(Vec::new());
    }
    let inside = ByteRange::between(range.start(), end);
    let status = edge.status_through(inside, None).await?;
    let is_zero = matches!(
        status.extent.kind,
        ExtentKind::Zero { .. } | ExtentKind::Unallocated
    );
    if is_zero && status.extent.length == inside.length() {
        return Ok(vec![0; inside.length() as usize]);
    }
    let memory = MemorySlice::zeroed(inside.length() as usize);
    edge.read(inside.start(), memory.clone().into()).await?;
    Ok(memory.to_vec())
}

fn hash_and_compare(range: ByteRange, parts: &[Vec<u8>]) -> Compared {
    let hashes = parts
        .iter()
        .map(|part| Sha256::digest(part).into())
        .collect();
    let mut compared = Compared {
        hashes,
        difference: None,
        differing: 0,
    };
    if let [one, two] = parts
        && one != two
    {
        let longer = one.len().max(two.len());
        let differs = |at: &usize| one.get(*at) != two.get(*at);
        let mut places = (0..longer).filter(differs);
        let first = places.next().unwrap_or(0);
        let (rest, last) = places.fold((0, first), |(count, _), at| (count + 1, at));
        let start = range.start();
        compared.difference = Some(ByteRange::between(
            start + first as u64,
            start + last as u64 + 1,
        ));
        compared.differing = 1 + rest;
    }
    compared
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What is told of a disk.
struct Side {
    name: String,
    size: u64,
    digest: String,
}

impl Side {
    fn json(&self) -> Value {
        json!({"name": self.name, "size": self.size, "digest": self.digest})
    }
}

/// What was found out.
struct Verdict {
    /// The backup, and the moment where there is one.
    sides: Vec<Side>,
    /// The digest that the backup is to have.
    wanted: Option<String>,
    differences: Vec<ByteRange>,
    differing: u64,
}

impl Verdict {
    /// There is something to compare with.
    fn compares(&self) -> bool {
        self.wanted.is_some() || self.sides.len() > 1
    }

    fn has_wanted(&self) -> bool {
        self.wanted
            .as_ref()
            .is_none_or(|wanted| *wanted == self.sides[0].digest)
    }

    fn is_good(&self) -> bool {
        self.differing == 0 && self.has_wanted()
    }

    fn json(&self) -> Value {
        let mut value = json!({"backup": self.sides[0].json()});
        if let Some(moment) = self.sides.get(1) {
            let range =
                |range: &ByteRange| json!({"start": range.start(), "length": range.length()});
            value["moment"] = moment.json();
            value["differing-bytes"] = self.differing.into();
            value["differences"] = self.differences.iter().map(range).collect();
        }
        if self.compares() {
            value["identical"] = self.is_good().into();
        }
        value
    }

    fn text(&self) -> String {
        let mut lines: Vec<String> = self
            .sides
            .iter()
            .map(|side| format!("{}  {} bytes  {}", side.digest, side.size, side.name))
            .collect();
        for range in &self.differences {
            let (start, length) = (range.start(), range.length());
            lines.push(format!(
                "different: {length} bytes from {start} ({start:#x}) on"
            ));
        }
        if let [backup, moment] = &self.sides[..] {
            if backup.size != moment.size {
                lines.push("different: the sizes".to_owned());
            }
            if self.differing > 0 {
                lines.push(format!("different: {} bytes in all", self.differing));
            }
        }
        if !self.has_wanted() {
            lines.push("different: the digest is not the one that was given".to_owned());
        }
        if self.compares() && self.is_good() {
            lines.push("identical".to_owned());
        }
        lines.push(String::new());
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(one: &[u8], two: &[u8]) -> Option<ByteRange> {
        hash_and_compare(ByteRange::between(100, 110), &[one.to_vec(), two.to_vec()]).difference
    }

    #[test]
    fn only_bytes_that_differ_are_counted() {
        let range = ByteRange::between(0, 6);
        let compared = hash_and_compare(range, &[b"abcdef".to_vec(), b"aXcdYfgh".to_vec()]);
        assert_eq!(compared.differing, 4);
    }

    #[test]
    fn differences_reach_from_the_first_to_the_last_byte() {
        assert_eq!(difference(b"abcdef", b"abcdef"), None);
        assert_eq!(
            difference(b"abcdef", b"aXcdYf"),
            Some(ByteRange::between(101, 105))
        );
        assert_eq!(
            difference(b"abcdef", b"abc"),
            Some(ByteRange::between(103, 106))
        );
        assert_eq!(difference(b"", b"\0"), Some(ByteRange::between(100, 101)));
    }
}
