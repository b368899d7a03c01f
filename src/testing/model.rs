//! The reference model: what reads of a disk may return, and what may be left after a crash.
//!
//! For each sector the model keeps the contents that writes have offered it, with the moments at
//! which each began and was answered. A content is out once another one was written after it: begun
//! after it was answered, and answered itself. For what a crash may leave, only answers count that a
//! completed flush covers.

use std::fmt;
use std::rc::Rc;

use crate::range::ByteRange;

use super::SECTOR;

type Bytes = Rc<[u8]>;

/// What a disk should hold.
#[derive(Clone)]
pub struct Model {
    sectors: Vec<Sector>,
    size: u64,
    sizes: Vec<u64>,
    /// When the last change of the size was answered.
    resized: Option<u64>,
    zero: Bytes,
    now: u64,
}

#[derive(Clone, Default)]
struct Sector {
    /// What a read may return.
    current: Vec<Version>,
    /// What a crash may leave.
    survivors: Vec<Version>,
    /// A crash may leave anything: it was cut off the disk.
    anything: bool,
}

#[derive(Clone)]
struct Version {
    number: u64,
    content: Bytes,
    began: u64,
    answered: Option<u64>,
    /// It replaces what was before; a discard or a failed write need not.
    binding: bool,
}

/// A change of the disk that has begun.
#[must_use = "a change ends by an answer"]
pub struct Pending {
    range: ByteRange,
    number: u64,
    hint: bool,
}

/// A flush that has begun.
#[must_use = "a flush ends by an answer"]
pub struct PendingFlush {
    began: u64,
}

/// A sector that holds what it must not.
#[derive(Debug)]
pub struct Mismatch {
    /// Its first byte.
    pub offset: u64,
    /// What it holds.
    pub found: String,
    /// What it may hold.
    pub allowed: Vec<String>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch {
            offset,
            found,
            allowed,
        } = self;
        let allowed = allowed.join(" or ");
        write!(f, "sector at {offset:#x} holds {found}, allowed: {allowed}")
    }
}

impl Model {
    /// A disk of so many bytes that reads as zeroes, durably.
    pub fn zeroed(size: u64) -> Model {
        let zero: Bytes = vec![0; SECTOR as usize].into();
        let mut model = Model {
            sectors: Vec::new(),
            size,
            sizes: vec![size],
            resized: None,
            zero,
            now: 1,
        };
        model.fit();
        model
    }

    /// A disk with these bytes, all durable.
    pub fn from_bytes(bytes: &[u8]) -> Model {
        let mut model = Model::zeroed(bytes.len() as u64);
        for (index, chunk) in bytes.chunks(SECTOR as usize).enumerate() {
            if chunk.iter().any(|byte| *byte != 0) {
                let content = model.padded(chunk);
                model.sectors[index].settle(content);
            }
        }
        model
    }

    /// Bytes on the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Sizes that a crash may leave.
    pub fn sizes_after_crash(&self) -> &[u64] {
        &self.sizes
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    fn padded(&self, bytes: &[u8]) -> Bytes {
        let mut content = vec![0; SECTOR as usize];
        content[..bytes.len()].copy_from_slice(bytes);
        content.into()
    }

    fn fit(&mut self) {
        let count = self.size.div_ceil(SECTOR) as usize;
        let zero = self.zero.clone();
        while self.sectors.len() < count {
            let mut sector = Sector::default();
            sector.settle(zero.clone());
            self.sectors.push(sector);
        }
    }

    /// A write begins.
    pub fn begin_write(&mut self, offset: u64, bytes: &[u8]) -> Pending {
        let range = ByteRange::between(offset, offset + bytes.len() as u64);
        self.begin(range, false, |start, length| {
            bytes[(start - offset) as usize..][..length].to_vec()
        })
    }

    /// A request for zeroes begins.
    pub fn begin_zeroes(&mut self, range: ByteRange) -> Pending {
        self.begin(range, false, |_, length| vec![0; length])
    }

    /// A discard begins: what was there may stay or become zeroes.
    pub fn begin_discard(&mut self, range: ByteRange) -> Pending {
        self.begin(range, true, |_, length| vec![0; length])
    }

    fn begin(
        &mut self,
        range: ByteRange,
        hint: bool,
        piece: impl Fn(u64, usize) -> Vec<u8>,
    ) -> Pending {
        assert!(range.end() <= self.size, "{range} is outside the model");
        let number = self.tick();
        for index in sectors_of(&range) {
            let start = range.start().max(index as u64 * SECTOR);
            let end = range.end().min((index as u64 + 1) * SECTOR);
            let bytes = piece(start, (end - start) as usize);
            self.sectors[index].offer((start % SECTOR) as usize, &bytes, number, &self.zero);
        }
        Pending {
            range,
            number,
            hint,
        }
    }

    /// A change was answered. `done`: successfully; otherwise any part of it may have happened.
    pub fn end(&mut self, pending: Pending, done: bool) {
        let now = self.tick();
        for index in sectors_of(&pending.range) {
            if let Some(sector) = self.sectors.get_mut(index) {
                sector.answer(pending.number, now, done && !pending.hint);
            }
        }
    }

    /// A write with FUA was answered successfully: it is durable.
    pub fn end_durable(&mut self, pending: Pending) {
        let (range, number) = (pending.range, pending.number);
        self.end(pending, true);
        for index in sectors_of(&range) {
            if let Some(sector) = self.sectors.get_mut(index) {
                let durable = |version: &Version| version.number == number;
                retire(&mut sector.survivors, &durable);
            }
        }
    }

    /// A flush begins.
    pub fn begin_flush(&mut self) -> PendingFlush {
        PendingFlush { began: self.tick() }
    }

    /// A flush was answered successfully; for one that failed just drop the [`PendingFlush`].
    pub fn end_flush(&mut self, flush: PendingFlush) {
        let covered = |version: &Version| version.answered.is_some_and(|at| at <= flush.began);
        let resized = self.resized.is_some_and(|at| at <= flush.began);
        for sector in &mut self.sectors {
            retire(&mut sector.survivors, &covered);
            sector.anything &= !resized;
        }
        if resized {
            self.sizes = vec![self.size];
        }
    }

    /// The size is about to change; no other change is in flight.
    pub fn begin_resize(&mut self, size: u64) {
        self.tick();
        self.resized = None;
        self.sizes.push(size);
        for sector in self.sectors.iter_mut().skip((size / SECTOR) as usize) {
            sector.anything = true;
        }
    }

    /// The size has changed: new bytes are zeroes. Durable with the next flush.
    pub fn end_resize(&mut self, size: u64) {
        self.resized = Some(self.tick());
        let kept = self.size.min(size).div_ceil(SECTOR) as usize;
        self.size = size;
        self.sectors.truncate(kept);
        self.fit();
        for sector in &mut self.sectors[kept..] {
            sector.anything = true;
        }
    }

    /// The size is what it was, but what was to be cut off may be zeroes by now.
    pub fn fail_resize(&mut self, size: u64) {
        self.resized = Some(self.tick());
        if size < self.size {
            let lost = self.begin_discard(ByteRange::between(size, self.size));
            self.end(lost, true);
        }
    }

    /// Checks bytes that a read returned, and remembers which of several allowed contents it saw.
    ///
    /// # Errors
    /// The first sector that holds what it must not.
    pub fn check_read(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Mismatch> {
        let range = ByteRange::between(offset, offset + bytes.len() as u64);
        for index in sectors_of(&range) {
            let start = range.start().max(index as u64 * SECTOR);
            let end = range.end().min((index as u64 + 1) * SECTOR);
            let found = &bytes[(start - offset) as usize..(end - offset) as usize];
            let within = (start % SECTOR) as usize..(start % SECTOR) as usize + found.len();
            let sector = &mut self.sectors[index];
            let allowed = |version: &Version| version.content[within.clone()] == *found;
            if !sector.current.iter().any(allowed) {
                return Err(mismatch(start, found, &sector.current));
            }
            if sector.is_quiet() {
                sector.current.retain(allowed);
            }
        }
        Ok(())
    }

    /// Checks what a crash left, from the first byte to the last, and goes on from there: it is
    /// what the disk holds now, durably.
    ///
    /// # Errors
    /// As [`Model::check_read`]; and a size that is not allowed.
    pub fn check_after_crash(&mut self, bytes: &[u8]) -> Result<(), Mismatch> {
        let size = bytes.len() as u64;
        if !self.sizes.contains(&size) {
            return Err(Mismatch {
                offset: size,
                found: format!("the end of the disk at {size:#x}"),
                allowed: self.sizes.iter().map(|size| format!("{size:#x}")).collect(),
            });
        }
        for (index, found) in bytes.chunks(SECTOR as usize).enumerate() {
            let Some(sector) = self.sectors.get(index) else {
                break;
            };
            let left = |version: &Version| version.content[..found.len()] == *found;
            if !sector.anything && !sector.survivors.iter().any(left) {
                let offset = index as u64 * SECTOR;
                return Err(mismatch(offset, found, &sector.survivors));
            }
        }
        *self = Model::from_bytes(bytes);
        Ok(())
    }
}

impl Sector {
    /// One content, for ever there and durable.
    fn settle(&mut self, content: Bytes) {
        let version = Version {
            number: 0,
            content,
            began: 0,
            answered: Some(0),
            binding: true,
        };
        self.current = vec![version.clone()];
        self.survivors = vec![version];
        self.anything = false;
    }

    /// No change is in flight.
    fn is_quiet(&self) -> bool {
        self.current
            .iter()
            .all(|version| version.answered.is_some())
    }

    fn offer(&mut self, at: usize, bytes: &[u8], number: u64, zero: &Bytes) {
        let whole = bytes.len() == SECTOR as usize;
        let offered = |versions: &mut Vec<Version>| {
            let contents: Vec<Bytes> = if whole && bytes.iter().all(|byte| *byte == 0) {
                vec![zero.clone()]
            } else if whole {
                vec![bytes.into()]
            } else {
                versions
                    .iter()
                    .map(|version| merged(&version.content, at, bytes))
                    .collect()
            };
            for content in contents {
                versions.push(Version {
                    number,
                    content,
                    began: number,
                    answered: None,
                    binding: false,
                });
            }
        };
        offered(&mut self.current);
        offered(&mut self.survivors);
    }

    fn answer(&mut self, number: u64, now: u64, binding: bool) {
        for version in self.current.iter_mut().chain(&mut self.survivors) {
            if version.number == number {
                version.answered = Some(now);
                version.binding = binding;
            }
        }
        retire(&mut self.current, &|_| true);
    }
}

/// Removes versions that a later one replaced, of those that count.
fn retire(versions: &mut Vec<Version>, counts: &dyn Fn(&Version) -> bool) {
    let latest = versions
        .iter()
        .filter(|version| version.binding && version.answered.is_some() && counts(version))
        .map(|version| version.began)
        .max();
    if let Some(latest) = latest {
        versions.retain(|version| version.answered.is_none_or(|at| at >= latest));
    }
}

fn merged(content: &Bytes, at: usize, bytes: &[u8]) -> Bytes {
    let mut merged = content.to_vec();
    merged[at..at + bytes.len()].copy_from_slice(bytes);
    merged.into()
}

fn sectors_of(range: &ByteRange) -> std::ops::Range<usize> {
    (range.start() / SECTOR) as usize..range.end().div_ceil(SECTOR) as usize
}

fn mismatch(offset: u64, found: &[u8], versions: &[Version]) -> Mismatch {
    let within = (offset % SECTOR) as usize;
    Mismatch {
        offset,
        found: describe(found),
        allowed: versions
            .iter()
            .map(|version| describe(&version.content[within..within + found.len()]))
            .collect(),
    }
}

/// The content of write number `stamp` for a range: each 8 bytes tell the stamp and the offset, so
/// that a misplaced byte names where it came from.
pub fn stamped(stamp: u32, range: &ByteRange) -> Vec<u8> {
    (range.start()..range.end())
        .map(|offset| {
            let word = (u64::from(stamp) << 32) | ((offset / 8) & 0xffff_ffff);
            word.to_le_bytes()[(offset % 8) as usize]
        })
        .collect()
}

fn describe(bytes: &[u8]) -> String {
    if bytes.iter().all(|byte| *byte == 0) {
        return "zeroes".to_owned();
    }
    let Some(word) = bytes.first_chunk::<8>() else {
        return format!("{bytes:02x?}");
    };
    let word = u64::from_le_bytes(*word);
    let (stamp, offset) = (word >> 32, (word & 0xffff_ffff) * 8);
    format!("write {stamp} for {offset:#x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector(value: u8) -> Vec<u8> {
        vec![value; 512]
    }

    fn survives(model: &Model, value: u8) -> bool {
        model.clone().check_after_crash(&sector(value)).is_ok()
    }

    fn write(model: &mut Model, value: u8) {
        let pending = model.begin_write(0, &sector(value));
        model.end(pending, true);
    }

    #[test]
    fn a_read_sees_the_last_write() {
        let mut model = Model::zeroed(512);
        write(&mut model, 1);
        assert!(model.check_read(0, &sector(1)).is_ok());
        assert!(model.check_read(0, &sector(0)).is_err());
    }

    #[test]
    fn a_crash_leaves_what_was_flushed_or_came_later() {
        let mut model = Model::zeroed(512);
        write(&mut model, 1);
        let flush = model.begin_flush();
        write(&mut model, 2);
        model.end_flush(flush);
        assert!(!survives(&model, 0));
        assert!(survives(&model, 1) && survives(&model, 2));
        let flush = model.begin_flush();
        model.end_flush(flush);
        assert!(!survives(&model, 1));
        assert!(survives(&model, 2));
    }

    #[test]
    fn a_failed_flush_or_write_promises_nothing() {
        let mut model = Model::zeroed(512);
        write(&mut model, 1);
        drop(model.begin_flush());
        assert!(survives(&model, 0));
        let failed = model.begin_write(0, &sector(2));
        model.end(failed, false);
        assert!(model.clone().check_read(0, &sector(1)).is_ok());
        assert!(model.check_read(0, &sector(2)).is_ok());
        assert!(model.check_read(0, &sector(1)).is_err(), "it was seen");
    }

    #[test]
    fn writes_in_flight_together_may_end_in_either_order() {
        let mut model = Model::zeroed(512);
        let first = model.begin_write(0, &sector(1));
        let second = model.begin_write(0, &sector(2));
        assert!(model.check_read(0, &sector(0)).is_ok());
        model.end(second, true);
        assert!(model.check_read(0, &sector(1)).is_ok());
        model.end(first, true);
        assert!(model.check_read(0, &sector(0)).is_err());
        assert!(model.check_read(0, &sector(2)).is_ok());
    }

    #[test]
    fn a_discard_is_a_hint() {
        let mut model = Model::zeroed(512);
        write(&mut model, 1);
        let discard = model.begin_discard(ByteRange::between(0, 512));
        model.end(discard, true);
        assert!(model.clone().check_read(0, &sector(1)).is_ok());
        assert!(model.check_read(0, &sector(0)).is_ok());
        assert!(model.check_read(0, &sector(1)).is_err());
    }

    #[test]
    fn a_durable_write_needs_no_flush() {
        let mut model = Model::zeroed(512);
        let pending = model.begin_write(0, &sector(1));
        model.end_durable(pending);
        assert!(!survives(&model, 0));
    }

    #[test]
    fn bytes_inside_a_sector() {
        let mut model = Model::zeroed(1024);
        let pending = model.begin_write(510, &[7, 7, 7]);
        model.end(pending, true);
        assert!(model.check_read(509, &[0, 7, 7, 7, 0]).is_ok());
    }

    #[test]
    fn resizing_leaves_zeroes() {
        let mut model = Model::from_bytes(&[1; 1024]);
        model.begin_resize(512);
        model.end_resize(512);
        model.begin_resize(1024);
        model.end_resize(1024);
        assert!(model.check_read(512, &[0; 512]).is_ok());
        assert!(model.clone().check_after_crash(&[1; 512]).is_ok());
        assert!(model.clone().check_after_crash(&[1; 1024]).is_ok());
        let flush = model.begin_flush();
        model.end_flush(flush);
        assert!(model.clone().check_after_crash(&[1; 512]).is_err());
        assert!(model.check_after_crash(&[1; 1024]).is_err());
    }
}
