//! What a driver is about to do with its file, told to the node there: `blkdebug` acts on it.
//!
//! The names are QEMU's, and so is the place where each happens, as far as its documentation and its programs
//! tell. What has no code here does not happen.

/// A moment in the work of a driver on its file, just before the request that it is named after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugEvent {
    /// The node is opened.
    None,
    /// Entries of the L1 table are written.
    L1Update,
    /// Room for a longer L1 table is taken.
    L1GrowAllocTable,
    /// A longer L1 table is written.
    L1GrowWriteTable,
    /// The header gets a longer L1 table.
    L1GrowActivateTable,
    /// A part of an L2 table is read.
    L2Load,
    /// A part of an L2 table is written.
    L2Update,
    /// An L2 table that others use too is read for a copy.
    L2AllocCowRead,
    /// A new L2 table is written for the first time.
    L2AllocWrite,
    /// Guest data is read.
    ReadAio,
    /// Guest data is read from the backing file.
    ReadBackingAio,
    /// A compressed cluster is read.
    ReadCompressed,
    /// Guest data is written.
    WriteAio,
    /// What a new cluster has around the guest's data is read.
    CowRead,
    /// What a new cluster has around the guest's data is written.
    CowWrite,
    /// The refcount table is read.
    ReftableLoad,
    /// A longer refcount table is needed.
    ReftableGrow,
    /// Entries of the refcount table are written.
    ReftableUpdate,
    /// A part of a refcount block is read.
    RefblockLoad,
    /// A part of a refcount block is written.
    RefblockUpdatePart,
    /// A new refcount block is needed.
    RefblockAlloc,
    /// A new refcount block is written for the first time.
    RefblockAllocWrite,
    /// The blocks that a longer refcount table begins with are written.
    RefblockAllocWriteBlocks,
    /// A longer refcount table is written.
    RefblockAllocWriteTable,
    /// The header gets a longer refcount table.
    RefblockAllocSwitchTable,
    /// Clusters are taken.
    ClusterAlloc,
    /// Clusters lose a reference.
    ClusterFree,
    /// A flush comes.
    FlushToOs,
    /// A flush is passed on.
    FlushToDisk,
    /// The first block of an unaligned write is read.
    PwritevRmwHead,
    /// The first block of an unaligned write was read.
    PwritevRmwAfterHead,
    /// The last block of an unaligned write is read.
    PwritevRmwTail,
    /// The last block of an unaligned write was read.
    PwritevRmwAfterTail,
    /// Data is written to the node.
    Pwritev,
    /// Zeroes are written to the node.
    PwritevZero,
    /// A write, of data or zeroes, was carried out.
    PwritevDone,
    /// What was read from below is stored.
    CorWrite,
}

/// QEMU's names, in its order, and what happens here under each.
pub const DEBUG_EVENTS: [(&str, Option<DebugEvent>); 48] = [
    ("l1_update", Some(DebugEvent::L1Update)),
    ("l1_grow_alloc_table", Some(DebugEvent::L1GrowAllocTable)),
    ("l1_grow_write_table", Some(DebugEvent::L1GrowWriteTable)),
    (
        "l1_grow_activate_table",
        Some(DebugEvent::L1GrowActivateTable),
    ),
    ("l2_load", Some(DebugEvent::L2Load)),
    ("l2_update", Some(DebugEvent::L2Update)),
    ("l2_update_compressed", None),
    ("l2_alloc_cow_read", Some(DebugEvent::L2AllocCowRead)),
    ("l2_alloc_write", Some(DebugEvent::L2AllocWrite)),
    ("read_aio", Some(DebugEvent::ReadAio)),
    ("read_backing_aio", Some(DebugEvent::ReadBackingAio)),
    ("read_compressed", Some(DebugEvent::ReadCompressed)),
    ("write_aio", Some(DebugEvent::WriteAio)),
    ("write_compressed", None),
    ("vmstate_load", None),
    ("vmstate_save", None),
    ("cow_read", Some(DebugEvent::CowRead)),
    ("cow_write", Some(DebugEvent::CowWrite)),
    ("reftable_load", Some(DebugEvent::ReftableLoad)),
    ("reftable_grow", Some(DebugEvent::ReftableGrow)),
    ("reftable_update", Some(DebugEvent::ReftableUpdate)),
    ("refblock_load", Some(DebugEvent::RefblockLoad)),
    ("refblock_update", None),
    ("refblock_update_part", Some(DebugEvent::RefblockUpdatePart)),
    ("refblock_alloc", Some(DebugEvent::RefblockAlloc)),
    ("refblock_alloc_hookup", None),
    ("refblock_alloc_write", Some(DebugEvent::RefblockAllocWrite)),
    (
        "refblock_alloc_write_blocks",
        Some(DebugEvent::RefblockAllocWriteBlocks),
    ),
    (
        "refblock_alloc_write_table",
        Some(DebugEvent::RefblockAllocWriteTable),
    ),
    (
        "refblock_alloc_switch_table",
        Some(DebugEvent::RefblockAllocSwitchTable),
    ),
    ("cluster_alloc", Some(DebugEvent::ClusterAlloc)),
    ("cluster_alloc_bytes", None),
    ("cluster_free", Some(DebugEvent::ClusterFree)),
    ("flush_to_os", Some(DebugEvent::FlushToOs)),
    ("flush_to_disk", Some(DebugEvent::FlushToDisk)),
    ("pwritev_rmw_head", Some(DebugEvent::PwritevRmwHead)),
    (
        "pwritev_rmw_after_head",
        Some(DebugEvent::PwritevRmwAfterHead),
    ),
    ("pwritev_rmw_tail", Some(DebugEvent::PwritevRmwTail)),
    (
        "pwritev_rmw_after_tail",
        Some(DebugEvent::PwritevRmwAfterTail),
    ),
    ("pwritev", Some(DebugEvent::Pwritev)),
    ("pwritev_zero", Some(DebugEvent::PwritevZero)),
    ("pwritev_done", Some(DebugEvent::PwritevDone)),
    ("empty_image_prepare", None),
    ("l1_shrink_write_table", None),
    ("l1_shrink_free_l2_clusters", None),
    ("cor_write", Some(DebugEvent::CorWrite)),
    ("cluster_alloc_space", None),
    ("none", Some(DebugEvent::None)),
];
