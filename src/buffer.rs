//! Memory and kernel buffers that requests carry.
//!
//! A [`Payload`] is a slice of *memory* (aligned, shared by reference count, so that the ring can keep it
//! alive while the kernel works on it), of a *kernel buffer* (the pages of a ublk request, registered
//! with the I/O thread's ring and never mapped here), or, in writes, of another *file*. Nodes slice and
//! forward payloads; who must touch bytes asks for [`Payload::copy_in`], [`Payload::copy_out`] or
//! [`Payload::fill_zero`].
//!
//! Invariant: memory under I/O is only reached through raw pointers; no reference into it is handed
//! out, only copies are, so that a kernel write never races with a Rust reference.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::rc::Rc;

use nix::errno::Errno;

mod file_slice;
mod payload;

pub use file_slice::{FileSlice, SourceFile};
pub use payload::{KernelBuffer, KernelSlice, Payload};

/// Every memory buffer starts at a multiple of this, which direct I/O on any device accepts.
pub const MEMORY_ALIGNMENT: usize = 4096;

/// Owned, zero-initialised memory at [`MEMORY_ALIGNMENT`], shared between requests and the ring.
pub struct Memory {
    /// What was allocated: `pointer` is the first aligned byte in it.
    base: NonNull<u8>,
    pointer: NonNull<u8>,
    length: usize,
    home: RefCell<Option<std::rc::Weak<PoolShelf>>>,
}

impl Memory {
    fn allocate(length: usize) -> Memory {
        assert!(length > 0, "memory of no bytes");
        let layout = Memory::layout(length);
        // SAFETY: the layout has a non-zero size.
        let base = unsafe { alloc_zeroed(layout) };
        let base = NonNull::new(base).unwrap_or_else(|| handle_alloc_error(layout));
        Memory::at(base, length)
    }

    /// The memory of `length` bytes that was allocated at `base`.
    fn at(base: NonNull<u8>, length: usize) -> Memory {
        let gap = base.as_ptr().align_offset(MEMORY_ALIGNMENT);
        Memory {
            base,
            // SAFETY: the layout has room for `length` bytes from the first aligned byte on.
            pointer: unsafe { base.add(gap) },
            length,
            home: RefCell::new(None),
        }
    }

    /// Aligned by hand: the allocator clears memory of a larger alignment by writing to it, but leaves
    /// the pages of a large plain allocation to the kernel, untouched.
    fn layout(length: usize) -> Layout {
        let room = length.checked_add(MEMORY_ALIGNMENT - 1);
        match room.map(|room| Layout::from_size_align(room, 1)) {
            Some(Ok(layout)) => layout,
            _ => unreachable!("buffer length {length} overflows the address space"),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(shelf) = self
            .home
            .borrow_mut()
            .take()
            .and_then(|weak| weak.upgrade())
            && shelf.keep(self.base, self.length)
        {
            return;
        }
        // SAFETY: allocated in `allocate` with the same layout, and freed once: this is the drop.
        unsafe { dealloc(self.base.as_ptr(), Memory::layout(self.length)) }
    }
}

/// A part of a [`Memory`], cheap to clone and to slice.
#[derive(Clone)]
pub struct MemorySlice {
    memory: Rc<Memory>,
    start: usize,
    length: usize,
}

impl MemorySlice {
    /// New zeroed memory of `length` bytes; `length` may be 0.
    pub fn zeroed(length: usize) -> MemorySlice {
        let memory = Rc::new(Memory::allocate(length.max(1)));
        MemorySlice {
            memory,
            start: 0,
            length,
        }
    }

    /// New memory with these bytes.
    pub fn from_bytes(bytes: &[u8]) -> MemorySlice {
        let slice = MemorySlice::zeroed(bytes.len());
        slice.copy_in(0, bytes);
        slice
    }

    /// Bytes in the slice.
    pub fn length(&self) -> usize {
        self.length
    }

    /// `length` bytes from `start`, which must be inside.
    pub fn slice(&self, start: usize, length: usize) -> MemorySlice {
        self.check(start, length);
        MemorySlice {
            memory: self.memory.clone(),
            start: self.start + start,
            length,
        }
    }

    /// The first byte, for the ring: valid as long as a clone of this slice lives.
    pub fn as_ptr(&self) -> *mut u8 {
        // SAFETY: `start` is inside the allocation.
        unsafe { self.memory.pointer.as_ptr().add(self.start) }
    }

    /// The address of the first byte is a multiple of `alignment` (a power of two).
    pub fn is_aligned(&self, alignment: usize) -> bool {
        self.as_ptr().addr() & (alignment - 1) == 0
    }

    /// Copies `bytes` into the slice at `offset`.
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) {
        self.check(offset, bytes.len());
        // SAFETY: bounds checked above; `bytes` cannot overlap, as no reference into the memory exists.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.as_ptr().add(offset), bytes.len());
        }
    }

    /// Copies bytes of the slice from `offset` into `bytes`.
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) {
        self.check(offset, bytes.len());
        // SAFETY: bounds checked above; `bytes` cannot overlap, as no reference into the memory exists.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.as_ptr().add(offset),
                bytes.as_mut_ptr(),
                bytes.len(),
            );
        }
    }

    /// Copies all of `source` into the slice at `offset`, memory to memory.
    pub fn copy_from(&self, offset: usize, source: &MemorySlice) {
        self.check(offset, source.length);
        // SAFETY: both ranges are inside their allocations; `copy` allows overlap.
        unsafe { std::ptr::copy(source.as_ptr(), self.as_ptr().add(offset), source.length) }
    }

    /// Sets `length` bytes from `offset` to `value`.
    pub fn fill(&self, offset: usize, length: usize, value: u8) {
        self.check(offset, length);
        // SAFETY: bounds checked above.
        unsafe { std::ptr::write_bytes(self.as_ptr().add(offset), value, length) }
    }

    /// A copy of the bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        self.copy_out(0, &mut bytes);
        bytes
    }

    /// Every byte is zero. The caller knows that no I/O writes to it now.
    pub fn is_zero(&self) -> bool {
        // SAFETY: the range is inside the allocation, initialised, and the caller holds I/O off.
        let bytes = unsafe { std::slice::from_raw_parts(self.as_ptr(), self.length) };
        // SAFETY: every bit pattern is a u128.
        let (head, words, tail) = unsafe { bytes.align_to::<u128>() };
        head.iter().chain(tail).all(|byte| *byte == 0) && words.iter().all(|word| *word == 0)
    }

    /// Reads from a file into the slice; the bytes read, 0 at the end of the file. May be short. Blocks.
    pub fn read_from(&self, file: &impl AsFd, offset: u64) -> Result<usize, Errno> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        uninterrupted(|| {
            // SAFETY: the slice is that long, and no reference into the memory exists.
            unsafe {
                let memory = self.as_ptr().cast();
                libc::pread(file.as_fd().as_raw_fd(), memory, self.length, offset)
            }
        })
    }

    /// Writes the slice to a file; the bytes written. May be short. Blocks.
    pub fn write_to(&self, file: &impl AsFd, offset: u64) -> Result<usize, Errno> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        uninterrupted(|| {
            // SAFETY: the slice is that long.
            unsafe {
                let memory = self.as_ptr().cast();
                libc::pwrite(file.as_fd().as_raw_fd(), memory, self.length, offset)
            }
        })
    }

    fn check(&self, start: usize, length: usize) {
        let end = start.checked_add(length);
        assert!(
            end.is_some_and(|end| end <= self.length),
            "{length} bytes from {start} are not inside a buffer of {}",
            self.length
        );
    }
}

impl fmt::Debug for MemorySlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory of {} bytes", self.length)
    }
}

/// Makes a system call again that a signal has interrupted.
fn uninterrupted(mut call: impl FnMut() -> libc::ssize_t) -> Result<usize, Errno> {
    loop {
        match Errno::result(call()) {
            Ok(count) => return usize::try_from(count).map_err(|_| Errno::EIO),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Keeps memory of one size for reuse, so that requests that need a bounce buffer do not allocate.
pub struct BufferPool {
    shelf: Rc<PoolShelf>,
}

struct PoolShelf {
    buffer_length: usize,
    most: usize,
    spare: RefCell<Vec<(NonNull<u8>, usize)>>,
}

impl PoolShelf {
    /// Takes the memory over if there is room for it.
    fn keep(&self, base: NonNull<u8>, length: usize) -> bool {
        let mut spare = self.spare.borrow_mut();
        let room = spare.len() < self.most;
        if room {
            spare.push((base, length));
        }
        room
    }
}

impl Drop for PoolShelf {
    fn drop(&mut self) {
        for (base, length) in self.spare.borrow_mut().drain(..) {
            // SAFETY: came from `Memory::allocate` with this layout and has no other owner.
            unsafe { dealloc(base.as_ptr(), Memory::layout(length)) }
        }
    }
}

impl BufferPool {
    /// A pool of buffers of `buffer_length` bytes that keeps at most `most` spare ones.
    pub fn new(buffer_length: usize, most: usize) -> BufferPool {
        let spare = RefCell::new(Vec::with_capacity(most));
        BufferPool {
            shelf: Rc::new(PoolShelf {
                buffer_length,
                most,
                spare,
            }),
        }
    }

    /// A buffer whose content is unspecified but initialised; returns to the pool when dropped.
    pub fn take(&self) -> MemorySlice {
        let spare = self.shelf.spare.borrow_mut().pop();
        let memory = match spare {
            Some((base, length)) => Memory::at(base, length),
            None => Memory::allocate(self.shelf.buffer_length),
        };
        memory.home.replace(Some(Rc::downgrade(&self.shelf)));
        MemorySlice {
            memory: Rc::new(memory),
            start: 0,
            length: self.shelf.buffer_length,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_share_bytes() {
        let whole = MemorySlice::zeroed(100);
        whole.slice(10, 5).copy_in(0, b"hello");
        assert_eq!(whole.slice(10, 5).to_vec(), b"hello");
        assert!(!whole.is_zero());
        assert!(whole.slice(15, 85).is_zero());
    }

    #[test]
    #[should_panic(expected = "not inside")]
    fn a_slice_cannot_leave_its_buffer() {
        MemorySlice::zeroed(10).slice(5, 6);
    }

    #[test]
    fn the_pool_reuses_memory_and_stays_bounded() {
        let pool = BufferPool::new(8192, 1);
        let (first, second) = (pool.take(), pool.take());
        let address = first.as_ptr().addr();
        drop(first);
        drop(second);
        assert_eq!(pool.shelf.spare.borrow().len(), 1);
        assert_eq!(pool.take().as_ptr().addr(), address);
    }

    #[test]
    fn buffers_outlive_their_pool() {
        let buffer = BufferPool::new(4096, 4).take();
        buffer.fill(0, 4096, 7);
        assert_eq!(buffer.to_vec(), vec![7; 4096]);
    }

    #[test]
    fn payload_copies_go_through_slices() {
        let payload = Payload::from(MemorySlice::zeroed(64)).slice(32, 32);
        payload
            .copy_in(8, &MemorySlice::from_bytes(b"abc"))
            .expect("memory copies");
        let back = MemorySlice::zeroed(3);
        payload.copy_out(8, &back).expect("memory copies");
        assert_eq!(back.to_vec(), b"abc");
    }
}
