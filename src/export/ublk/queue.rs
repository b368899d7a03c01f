//! Queues: one long-lived task per tag, all on the graph's I/O thread.
//!
//! A tag fetches a request, carries it out, and commits the answer together with the fetch of its
//! next one: one command per request, which never leaves the thread's ring.

use std::cell::Cell;
use std::os::fd::AsFd;
use std::rc::Rc;

use libublk::sys;
use nix::errno::Errno;

use super::abi::{Description, Operation, RESULT_REQUEST};
use super::descriptors::Descriptors;
use super::pages::RequestPages;
use super::request::{self, Request};
use crate::block::{BlockEvent, Child, Graph};
use crate::buffer::{KernelSlice, MemorySlice, Payload};
use crate::error::{Error, Result};
use crate::runtime::Handle;
use crate::runtime::ring::{BufferSlots, Ring, RingFile};
use crate::runtime::sync::Notify;

/// How the bytes of requests travel.
pub(super) enum Transport {
    /// The pages are registered with the ring, in these slots: one per tag of all queues.
    ZeroCopy(BufferSlots),
    /// The kernel copies from and to a buffer per tag of this many bytes.
    Copy { buffer_length: usize },
}

/// What all tags of a device share.
pub(super) struct Service {
    pub(super) ring: Ring,
    pub(super) device: Rc<RingFile>,
    pub(super) child: Rc<Child>,
    /// Who is told of requests that fail, and as whose.
    pub(super) graph: Graph,
    pub(super) export_id: String,
    pub(super) transport: Transport,
    pub(super) life: Rc<Life>,
}

impl Service {
    #[cold]
    fn failed(&self, request: &Description, error: &Error) {
        self.graph.emit(BlockEvent::RequestFailed {
            user: self.export_id.clone(),
            node_name: self.child.node().name().to_owned(),
            writes: request.operation != Operation::Read,
            errno: error.errno(),
        });
    }
}

/// Whether a device's tags are still served.
#[derive(Default)]
pub(super) struct Life {
    tags: Cell<u32>,
    /// The errno of a fetch that failed other than by the device's end.
    failure: Cell<Option<Errno>>,
    changed: Notify,
}

impl Life {
    /// Why serving failed, if it did.
    pub(super) fn failure(&self) -> Option<Errno> {
        self.failure.get()
    }

    /// Waits until a tag has failed or all have ended.
    pub(super) async fn until_over(&self) {
        while self.tags.get() > 0 && self.failure.get().is_none() {
            self.changed.notified().await;
        }
    }

    /// Waits until all tags have ended.
    pub(super) async fn until_idle(&self) {
        while self.tags.get() > 0 {
            self.changed.notified().await;
        }
    }

    fn enter(self: &Rc<Life>) -> TagLife {
        self.tags.set(self.tags.get() + 1);
        TagLife(self.clone())
    }
}

struct TagLife(Rc<Life>);

impl TagLife {
    fn fail(&self, errno: Errno) {
        self.0.failure.set(Some(errno));
        self.0.changed.notify_all();
    }
}

impl Drop for TagLife {
    fn drop(&mut self) {
        let left = self.0.tags.get() - 1;
        self.0.tags.set(left);
        if left == 0 {
            self.0.changed.notify_all();
        }
    }
}

/// Starts a task for each tag of queue `number`.
pub(super) fn start(handle: &Handle, service: &Rc<Service>, number: u16, depth: u16) -> Result<()> {
    let descriptors = Rc::new(Descriptors::map(service.device.as_fd(), number, depth)?);
    for tag in 0..depth {
        let slot_index = u32::from(number) * u32::from(depth) + u32::from(tag);
        let tag = Tag {
            service: service.clone(),
            descriptors: descriptors.clone(),
            queue: number,
            tag,
            bytes: TagBytes::new(service, number, tag, slot_index),
        };
        let life = service.life.enter();
        handle.spawn(tag.run(life)).detach();
    }
    Ok(())
}

/// Where one tag's bytes are.
enum TagBytes {
    Pages(Rc<RequestPages>),
    Memory(Rc<MemorySlice>),
}

impl TagBytes {
    fn new(service: &Service, queue: u16, tag: u16, index: u32) -> TagBytes {
        match &service.transport {
            Transport::ZeroCopy(slots) => {
                let device = service.device.clone();
                let pages = RequestPages::new(device, queue, tag, slots.slot(index));
                TagBytes::Pages(Rc::new(pages))
            }
            Transport::Copy { buffer_length } => {
                TagBytes::Memory(Rc::new(MemorySlice::zeroed(*buffer_length)))
            }
        }
    }
}

struct Tag {
    service: Rc<Service>,
    descriptors: Rc<Descriptors>,
    queue: u16,
    tag: u16,
    bytes: TagBytes,
}

impl Tag {
    async fn run(mut self, life: TagLife) {
        let mut fetched = self.command(sys::UBLK_U_IO_FETCH_REQ, 0).await;
        while fetched == RESULT_REQUEST {
            let answer = self.serve().await;
            fetched = self
                .command(sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, answer)
                .await;
        }
        self.end(fetched, &life);
    }

    /// A stopped device ends its fetches with `ENODEV`; anything else is a failure.
    fn end(&self, fetched: i32, life: &TagLife) {
        if fetched == sys::UBLK_IO_RES_ABORT {
            return;
        }
        let errno = Errno::from_raw(-fetched);
        tracing::error!(queue = self.queue, tag = self.tag, %errno, "ublk fetch failed");
        life.fail(errno);
    }

    /// Fetches the tag's next request, with the answer to the last one.
    async fn command(&self, operation: u32, answer: i32) -> i32 {
        let ring = &self.service.ring;
        let device = &self.service.device;
        match &self.bytes {
            TagBytes::Pages(pages) => {
                let arguments = self.arguments(answer, 0);
                let registration = registration(pages.slot());
                ring.uring_cmd16(device, operation, arguments, registration)
                    .await
            }
            TagBytes::Memory(buffer) => {
                let address = buffer.as_ptr().expose_provenance() as u64;
                let arguments = self.arguments(answer, address);
                ring.uring_cmd16(device, operation, arguments, 0)
                    .keep(buffer.clone())
                    .await
            }
        }
    }

    fn arguments(&self, answer: i32, address: u64) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..2].copy_from_slice(&self.queue.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&answer.to_ne_bytes());
        bytes[8..16].copy_from_slice(&address.to_ne_bytes());
        bytes
    }

    /// Carries out the request that was fetched; what to commit.
    async fn serve(&mut self) -> i32 {
        let request = Request::new(self.descriptors.read(self.tag));
        tracing::trace!(tag = self.tag, request = ?request.description(), "begins");
        let result = self.carry_out(&request).await;
        if let TagBytes::Pages(pages) = &mut self.bytes {
            retire(pages, &self.service.device);
        }
        if let Err(error) = &result {
            self.service.failed(request.description(), error);
        }
        let answer = request.answer(result);
        tracing::trace!(tag = self.tag, answer, "ends");
        answer
    }

    async fn carry_out(&self, request: &Request) -> Result<()> {
        let child = &*self.service.child;
        let description = request.description();
        let Some(length) = request.data_length() else {
            return request::serve(child, description, None).await;
        };
        match &self.bytes {
            TagBytes::Pages(pages) => {
                pages.begin(length);
                if description.unregistered {
                    return through_memory(child, description, pages).await;
                }
                let payload = Payload::Kernel(KernelSlice::whole(pages.clone()));
                request::serve(child, description, Some(payload)).await
            }
            TagBytes::Memory(buffer) if length <= buffer.length() => {
                let payload = Payload::Memory(buffer.slice(0, length));
                request::serve(child, description, Some(payload)).await
            }
            TagBytes::Memory(_) => Err(Error::from(Errno::EINVAL)),
        }
    }
}

/// Registers the next request's pages in `slot`, or delivers it unregistered where that fails.
fn registration(slot: u16) -> u64 {
    u64::from(slot) | u64::from(sys::UBLK_AUTO_BUF_REG_FALLBACK) << 16
}

/// The answered request's pages may not be reached any more. Where something still holds them, it
/// keeps them, revoked, and the tag goes on with others.
fn retire(pages: &mut Rc<RequestPages>, device: &Rc<RingFile>) {
    pages.end();
    if Rc::strong_count(pages) > 1 {
        *pages = Rc::new(pages.successor(device.clone()));
    }
}

/// For a request whose pages the kernel could not register: its bytes are copied.
async fn through_memory(
    child: &Child,
    description: &Description,
    pages: &RequestPages,
) -> Result<()> {
    let memory = MemorySlice::zeroed(description.length as usize);
    if description.operation == Operation::Write {
        pages.fetch(0, &memory)?;
    }
    request::serve(child, description, Some(memory.clone().into())).await?;
    if description.operation == Operation::Read {
        pages.store(0, &memory)?;
    }
    Ok(())
}
