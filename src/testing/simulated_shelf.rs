//! A [`Shelf`] that loses power between any two steps, and fails where it is told to.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;

use crate::block::{IoFuture, Shelf};
use crate::error::{Error, Result};
use crate::runtime::Handle;

use super::{Power, Random, VolatileStore};

/// What lies on a shelf when nobody uses it.
#[derive(Clone, Default)]
pub struct ShelfContent {
    /// Every file there ever was.
    files: Vec<VolatileStore>,
    /// The one that has the name.
    named: Option<usize>,
    /// Which had it since names were durable last, the durable one first.
    names: Vec<Option<usize>>,
    draft: Option<usize>,
}

impl ShelfContent {
    /// With this file.
    pub fn from_bytes(bytes: &[u8]) -> ShelfContent {
        ShelfContent {
            files: vec![VolatileStore::from_bytes(bytes)],
            named: Some(0),
            names: Vec::new(),
            draft: None,
        }
    }

    /// The file, if there is one.
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        self.named.map(|index| self.files[index].to_bytes())
    }
}

/// A file beside a simulated disk.
#[derive(Clone)]
pub struct SimulatedShelf {
    handle: Handle,
    power: Power,
    /// What tells of the image's last change.
    stamp: Rc<dyn Fn() -> String>,
    identity: Rc<RefCell<String>>,
    ignores_sync: bool,
    content: Rc<RefCell<ShelfContent>>,
    is_locked: Rc<Cell<bool>>,
    /// Steps that go well before those that fail, and how many of these.
    failing: Rc<Cell<Option<(u64, u64)>>>,
    steps: Rc<Cell<u64>>,
}

impl SimulatedShelf {
    /// A shelf that hangs on the same power as the image. `ignores_sync`: nothing on it is ever durable.
    pub fn new(
        handle: &Handle,
        power: &Power,
        content: ShelfContent,
        stamp: impl Fn() -> String + 'static,
        ignores_sync: bool,
    ) -> SimulatedShelf {
        SimulatedShelf {
            handle: handle.clone(),
            power: power.clone(),
            stamp: Rc::new(stamp),
            identity: Rc::new(RefCell::new("an image".to_owned())),
            ignores_sync,
            content: Rc::new(RefCell::new(content)),
            is_locked: Rc::default(),
            failing: Rc::default(),
            steps: Rc::default(),
        }
    }

    /// From now on it is beside another image.
    pub fn set_identity(&self, identity: &str) {
        *self.identity.borrow_mut() = identity.to_owned();
    }

    /// Steps that have begun.
    pub fn steps(&self) -> u64 {
        self.steps.get()
    }

    /// After so many steps that go well so many fail with `EIO`.
    pub fn fail_after(&self, well: u64, failing: u64) {
        self.failing.set(Some((well, failing)));
    }

    /// What is there when nothing is in flight.
    pub fn content(&self) -> ShelfContent {
        self.content.borrow().clone()
    }

    /// What is left after power failed.
    pub fn crash(&self, random: &mut Random) -> ShelfContent {
        let content = self.content.borrow();
        let mut names = content.names.clone();
        names.push(content.named);
        let named = random.choose(&names);
        let files = content.files.iter().map(|file| file.crash(random));
        ShelfContent {
            files: files.collect(),
            named,
            names: Vec::new(),
            draft: None,
        }
    }

    fn step<T: 'static>(
        &self,
        what: impl FnOnce(&mut ShelfContent) -> Result<T> + 'static,
    ) -> IoFuture<'_, T> {
        let shelf = self.clone();
        Box::pin(async move {
            shelf.power.count();
            shelf.steps.set(shelf.steps.get() + 1);
            if shelf.power.is_off() {
                return std::future::pending().await;
            }
            shelf.handle.sleep(Duration::from_micros(30)).await;
            // A step that fails may have been carried out.
            let fails = shelf.fails();
            if fails && shelf.steps.get().is_multiple_of(2) {
                return Err(failed());
            }
            let done = what(&mut shelf.content.borrow_mut());
            match fails {
                true => Err(failed()),
                false => done,
            }
        })
    }

    fn fails(&self) -> bool {
        let (well, failing) = match self.failing.get() {
            None | Some((0, 0)) => return false,
            Some((0, failing)) => (0, failing - 1),
            Some((well, failing)) => {
                self.failing.set(Some((well - 1, failing)));
                return false;
            }
        };
        self.failing.set(Some((well, failing)));
        true
    }

    fn sync_file(&self, which: fn(&ShelfContent) -> Option<usize>) -> IoFuture<'_, ()> {
        let ignores = self.ignores_sync;
        self.step(move |content| {
            let index = which(content).ok_or_else(failed)?;
            if !ignores {
                let sequence = content.files[index].sequence();
                content.files[index].flush(sequence);
            }
            Ok(())
        })
    }

    fn name(&self, which: fn(&mut ShelfContent) -> Option<usize>) -> IoFuture<'_, ()> {
        self.step(move |content| {
            let before = content.named;
            content.names.push(before);
            content.named = which(content);
            Ok(())
        })
    }
}

fn failed() -> Error {
    Error::from_errno(Errno::EIO, "a shelf that fails")
}

impl Shelf for SimulatedShelf {
    fn name(&self) -> String {
        "a shelf".to_owned()
    }

    fn identity(&self) -> IoFuture<'_, String> {
        Box::pin(async { Ok(self.identity.borrow().clone()) })
    }

    fn stamp(&self) -> IoFuture<'_, String> {
        Box::pin(async { Ok((self.stamp)()) })
    }

    fn lock(&self) -> IoFuture<'_, ()> {
        let locked = self.is_locked.clone();
        self.step(move |_| match locked.replace(true) {
            true => Err(failed()),
            false => Ok(()),
        })
    }

    fn unlock(&self) {
        self.is_locked.set(false);
    }

    fn read(&self) -> IoFuture<'_, Option<Vec<u8>>> {
        self.step(|content| Ok(content.to_bytes()))
    }

    fn write_draft(&self, bytes: Vec<u8>) -> IoFuture<'_, ()> {
        self.step(move |content| {
            let mut file = VolatileStore::default();
            file.write(0, &bytes);
            content.files.push(file);
            content.draft = Some(content.files.len() - 1);
            Ok(())
        })
    }

    fn sync_draft(&self) -> IoFuture<'_, ()> {
        self.sync_file(|content| content.draft)
    }

    fn put_draft(&self) -> IoFuture<'_, ()> {
        SimulatedShelf::name(self, |content| content.draft.take())
    }

    fn remove(&self) -> IoFuture<'_, ()> {
        SimulatedShelf::name(self, |_| None)
    }

    fn sync_names(&self) -> IoFuture<'_, ()> {
        let ignores = self.ignores_sync;
        self.step(move |content| {
            if !ignores {
                content.names.clear();
            }
            Ok(())
        })
    }

    fn write_at(&self, offset: u64, bytes: Vec<u8>) -> IoFuture<'_, ()> {
        self.step(move |content| {
            let index = content.named.ok_or_else(failed)?;
            content.files[index].write(offset, &bytes);
            Ok(())
        })
    }

    fn sync(&self) -> IoFuture<'_, ()> {
        self.sync_file(|content| content.named)
    }
}
