//! Seeded operations, as qemu-io commands and on a plain model.

/// In a model: a byte that may have any value.
const UNKNOWN: u16 = 0x100;

/// What a guest does.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Write {
        offset: u64,
        length: u64,
        pattern: u8,
    },
    Zero {
        offset: u64,
        length: u64,
        unmap: bool,
    },
    Discard {
        offset: u64,
        length: u64,
    },
    Flush,
}

impl Operation {
    fn command(self) -> String {
        match self {
            Self::Write {
                offset,
                length,
                pattern,
            } => {
                format!("write -q -P {pattern} {offset} {length}")
            }
            Self::Zero {
                offset,
                length,
                unmap,
            } => {
                let unmap = if unmap { "-u " } else { "" };
                format!("write -q -z {unmap}{offset} {length}")
            }
            Self::Discard { offset, length } => format!("discard -q {offset} {length}"),
            Self::Flush => "flush".into(),
        }
    }
}

/// The content a disk must have; discarded bytes may be anything.
#[derive(Clone)]
pub(crate) struct Model(Vec<u16>);

impl Model {
    /// A disk of zeroes.
    pub(crate) fn zeroes(size: u64) -> Self {
        Self(vec![0; size as usize])
    }

    /// Zeroes, but for one byte.
    pub(crate) fn with_byte(size: u64, offset: u64, value: u8) -> Self {
        let mut model = Self::zeroes(size);
        model.0[offset as usize] = u16::from(value);
        model
    }

    /// The disk of `size` bytes that an empty overlay of this one shows.
    pub(crate) fn resized(&self, size: u64) -> Self {
        let mut bytes = self.0.clone();
        bytes.resize(size as usize, 0);
        Self(bytes)
    }

    /// Bytes of the disk.
    pub(crate) fn size(&self) -> u64 {
        self.0.len() as u64
    }

    /// Hold what was read against the model.
    pub(crate) fn assert_equal(&self, read: &[u8], what: &str) {
        let differs = |(model, read): (&u16, &u8)| *model != UNKNOWN && *model != u16::from(*read);
        assert_eq!(self.0.len(), read.len(), "{what}: size");
        if let Some(offset) = self.0.iter().zip(read).position(differs) {
            let end = self.0.len().min(offset + 16);
            let (model, read) = (&self.0[offset..end], &read[offset..end]);
            panic!("{what}: at {offset:#x} expected {model:x?}, read {read:x?}");
        }
    }

    fn apply(&mut self, operation: Operation) {
        let (offset, length, value) = match operation {
            Operation::Write {
                offset,
                length,
                pattern,
            } => (offset, length, u16::from(pattern)),
            Operation::Zero { offset, length, .. } => (offset, length, 0),
            Operation::Discard { offset, length } => (offset, length, UNKNOWN),
            Operation::Flush => return,
        };
        self.0[offset as usize..][..length as usize].fill(value);
    }
}

/// A source of operations around the borders of clusters.
pub(crate) struct Workload {
    state: u64,
    cluster: u64,
}

impl Workload {
    /// Operations for images of this cluster size; the same seed gives the same ones.
    pub(crate) fn new(seed: u64, cluster: u64) -> Self {
        Self {
            state: seed ^ 0x9e37_79b9_7f4a_7c15,
            cluster,
        }
    }

    /// `count` operations, carried out on the model, as arguments of qemu-io.
    pub(crate) fn run(&mut self, count: usize, model: &mut Model) -> Vec<String> {
        let mut arguments = Vec::new();
        for _ in 0..count {
            let operation = self.operation(model.size());
            model.apply(operation);
            arguments.extend(["-c".to_owned(), operation.command()]);
        }
        arguments
    }

    fn operation(&mut self, size: u64) -> Operation {
        let kind = self.below(16);
        let offset = self.offset(size);
        let length = self.length().min(size - offset);
        match kind {
            0..=9 => Operation::Write {
                offset,
                length,
                pattern: self.below(255) as u8 + 1,
            },
            10..=12 => Operation::Zero {
                offset,
                length,
                unmap: self.below(2) == 0,
            },
            13..=14 => Operation::Discard { offset, length },
            _ => Operation::Flush,
        }
    }

    /// Often at the start of a cluster or close to it; often where others have been.
    fn offset(&mut self, size: u64) -> u64 {
        let hot = size.min(self.cluster * 24);
        let reach = if self.below(3) == 0 { size } else { hot };
        let offset = self.below(reach);
        match self.below(3) {
            0 => offset,
            1 => offset / 512 * 512,
            _ => offset / self.cluster * self.cluster,
        }
    }

    fn length(&mut self) -> u64 {
        match self.below(4) {
            0 => self.below(4096) + 1,
            1 => self.cluster,
            2 => (self.below(3) + 1) * self.cluster + self.below(self.cluster),
            _ => (self.below(16) + 1) * 512,
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}
