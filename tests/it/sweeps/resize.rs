//! Faults while the size of an image is changed.

use super::*;

const TRUNCATE_KINDS: [DiskOperation; 6] = [
    DiskOperation::Read,
    DiskOperation::Write,
    DiskOperation::Flush,
    DiskOperation::WriteZeroes,
    DiskOperation::Discard,
    DiskOperation::Truncate,
];

/// A run that grows, shrinks and grows the disk again, in which the disk operation number `nth` of a
/// kind fails. The size is what the caller was told, also after power fails; a failed change may be
/// asked for again.
fn resize_with(plan: &Plan, fault: Fault) -> u64 {
    simulate(plan.seed, |handle| async move {
        let power = Power::new();
        let Plan {
            geometry,
            disk,
            size,
            seed,
            ..
        } = plan;
        let flushes = fault.operations.contains(&DiskOperation::Flush);
        let mut chain = Chain::create(&handle, &power, geometry, *disk, *size, *seed).await;
        let options = WorkloadOptions {
            tolerated: vec![fault.errno, Errno::EIO],
            ..plan.workload.clone()
        };
        let guest = chain.guest.clone();
        let model = Model::zeroed(*size);
        let workload = Workload::new(&handle, guest, model, options, *seed);
        workload.run(40).await;
        if seed % 2 == 0 {
            chain.snapshot().await.expect("no fault yet");
            workload.run(20).await;
        }
        let top = chain.disks[chain.disks.len() - 1].clone();
        let lasting = fault.lasting;
        top.fail(fault);
        // An L1 table of one cluster more, a part of that, and all but the first sector.
        let l1_covers = 1 << (3 * geometry.cluster_bits - 6);
        for target in [
            size + l1_covers.min(8 << 20) + 512,
            size / 2 + 512,
            512,
            *size,
        ] {
            workload.resize(target & !511).await;
            workload.run(5).await;
        }
        top.heal();
        let struck = top.faults_struck();
        workload.verify().await;
        workload.resize((size / 3) & !511).await;
        workload.resize(*size & !511).await;
        workload.run(40).await;
        workload.verify().await;
        let flushed = workload.flush().await || workload.flush().await;
        assert!(flushed || flushes || lasting, "flushes fail for ever");
        chain.assert_sound(true, "after a fault in a resize").await;
        let left = chain.crash(&mut Random::new(*seed));
        let mut model = workload.model().clone();
        let reopened = Chain::open(&handle, &Power::new(), geometry, *disk, left, *seed).await;
        let reopened = reopened.expect("it can be opened again");
        let bytes = whole(&reopened).await.expect("it can be read");
        if let Err(mismatch) = model.check_after_crash(&bytes) {
            panic!("after a fault in a resize and a crash: {mismatch}");
        }
        struck
    })
}

fn resize_sweep(seed: u64, errno: Errno) {
    let mut plan = Plan::draw(seed);
    plan.geometry.cluster_bits = 9 + (seed % 4) as u32;
    plan.size = plan.size.min(128 << 10);
    for kind in TRUNCATE_KINDS {
        for lasting in [false, true] {
            for nth in (0..200).step_by(1 + seed as usize % 3) {
                let fault = match lasting {
                    true => Fault::from(&[kind], nth, errno),
                    false => Fault::once(&[kind], nth, errno),
                };
                let what = format!("{fault:?}");
                let told = Told(&what);
                let struck = resize_with(&plan, fault);
                drop(told);
                if struck == 0 {
                    break;
                }
            }
        }
    }
}

#[test]
fn a_fault_in_a_resize_harms_nothing() {
    for_each_seed("a_fault_in_a_resize", 6, |seed| {
        let errno = match seed % 2 {
            0 => Errno::EIO,
            _ => Errno::ENOSPC,
        };
        resize_sweep(seed, errno);
    });
}
