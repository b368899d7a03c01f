//! Where bitmaps of an image are kept that cannot hold them itself.

use super::IoFuture;

/// A file beside an image, and what is known of the image. Its steps are those that a crash may come between;
/// whoever uses it puts them in order, one at a time.
pub trait Shelf {
    /// The file, as messages name it.
    fn name(&self) -> String;

    /// Which image it is, as it was when it was opened: the same for as long as it is the same file or device.
    fn identity(&self) -> IoFuture<'_, String>;

    /// What is known of the image's last change without reading it: another one when it was changed since.
    fn stamp(&self) -> IoFuture<'_, String>;

    /// Makes what is missing of the file's directory, and keeps others away until [`Shelf::unlock`].
    ///
    /// # Errors
    /// The directory cannot be written, or somebody else has the lock.
    fn lock(&self) -> IoFuture<'_, ()>;

    /// Others may use the file.
    fn unlock(&self);

    /// All that is in the file, if there is one. From then on [`Shelf::write_at`] goes to that one.
    fn read(&self) -> IoFuture<'_, Option<Vec<u8>>>;

    /// Writes a new file beside it, in place of any other draft.
    fn write_draft(&self, bytes: Vec<u8>) -> IoFuture<'_, ()>;

    /// Makes the content of the draft durable.
    fn sync_draft(&self) -> IoFuture<'_, ()>;

    /// The draft takes the place of the file. A crash may leave either, until [`Shelf::sync_names`].
    fn put_draft(&self) -> IoFuture<'_, ()>;

    /// Takes the file away. A crash may leave it, until [`Shelf::sync_names`].
    fn remove(&self) -> IoFuture<'_, ()>;

    /// What [`Shelf::put_draft`] and [`Shelf::remove`] did is durable.
    fn sync_names(&self) -> IoFuture<'_, ()>;

    /// Overwrites a part of the file.
    fn write_at(&self, offset: u64, bytes: Vec<u8>) -> IoFuture<'_, ()>;

    /// Makes the content of the file durable.
    fn sync(&self) -> IoFuture<'_, ()>;
}
