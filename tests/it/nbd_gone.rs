//! Clients that go while the node still works for them: their requests run to their ends.

use std::io::Write;
use std::rc::Rc;
use std::time::Duration;

use liveblk::block::{Bitmap, BitmapFlags, DirtyBitmap, Node, NodeOptions};
use liveblk::export::RemoveMode;
use liveblk::runtime::sync::Event;

use crate::nbd_raw::{RawClient, WRITE};
use crate::nbd_server::{Site, memory, serve};

const SIZE: u64 = 1 << 20;

/// Long enough for a server to notice that a client has gone.
const NOTICED: Duration = Duration::from_millis(150);

/// An exported node with a bitmap, and a write to its first block that its disk holds back.
struct Held {
    node: Rc<Node>,
    bitmap: Rc<Bitmap>,
    disk: Rc<Event>,
}

impl Held {
    async fn begin(site: &Site) -> (Held, RawClient) {
        let node = site.node("n", SIZE, NodeOptions::default());
        site.export(&node, true);
        let bits = DirtyBitmap::new(SIZE, 4096);
        let bitmap = Rc::new(Bitmap::new("b", BitmapFlags::ENABLED, bits));
        node.bitmaps().add(bitmap.clone());
        let disk = Rc::new(Event::new());
        *memory(&node).held.borrow_mut() = Some(disk.clone());
        let socket = site.socket();
        let client = site.outside(move || {
            let mut client = RawClient::enter(&socket, "n");
            client.send(0, WRITE, 1, 0, 4096);
            client.0.write_all(&[7; 4096]).unwrap();
            client
        });
        let client = client.await;
        while node.statistics().writes == 0 {
            site.handle.yield_now().await;
        }
        (Held { node, bitmap, disk }, client)
    }

    /// The write lands, and the bitmap, which was cleared before, knows of it.
    async fn ends(self, site: &Site) {
        self.bitmap.clear().unwrap();
        assert_eq!(memory(&self.node).content(0, 4096), [0; 4096]);
        self.disk.set();
        while memory(&self.node).content(0, 4096) != [7; 4096] {
            site.handle.yield_now().await;
        }
        site.handle.yield_now().await;
        let dirty = self.bitmap.with_bits(|bits| bits.next_dirty(0));
        assert_eq!(dirty, Some(0), "a write landed that the bitmap missed");
    }
}

/// A future that is dropped does not stop its I/O. A client that went would have ended its write for all who
/// count and record: a backup program clears the bitmap, the write lands, and no backup has ever seen it.
#[test]
fn a_bitmap_has_the_write_of_a_client_that_has_gone() {
    serve(|site| async move {
        let (held, client) = Held::begin(&site).await;
        drop(client);
        site.handle.sleep(NOTICED).await;
        held.ends(&site).await;
    });
}

/// As above, with a snapshot in the place of the bitmap: the old image would be closed, and written after that.
#[test]
fn a_drained_section_waits_for_the_write_of_a_client_that_has_gone() {
    serve(|site| async move {
        let (Held { node, disk, .. }, client) = Held::begin(&site).await;
        drop(client);
        site.handle.sleep(NOTICED).await;
        let (graph, drained) = (site.graph.clone(), Rc::new(Event::new()));
        let (entered, below) = (drained.clone(), node.clone());
        let section = site.handle.spawn(async move {
            let section = graph.drain(&[below]).await.unwrap();
            entered.set();
            drop(section);
        });
        site.handle.sleep(NOTICED).await;
        assert!(!drained.is_set(), "drained with a write in flight");
        disk.set();
        section.await;
        assert_eq!(memory(&node).content(0, 4096), [7; 4096]);
    });
}

/// An export that is removed under its client is there until the last request has ended.
#[test]
fn an_export_goes_after_its_last_write_however_it_is_removed() {
    serve(|site| async move {
        let (held, _client) = Held::begin(&site).await;
        site.exports.remove("n", RemoveMode::Hard).await.unwrap();
        site.handle.sleep(NOTICED).await;
        assert!(site.deleted.borrow().is_empty(), "gone with a write");
        assert_eq!(held.node.parents().len(), 1);
        held.ends(&site).await;
        while site.deleted.borrow().is_empty() {
            site.handle.yield_now().await;
        }
    });
}
