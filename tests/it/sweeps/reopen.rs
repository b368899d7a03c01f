//! Power fails again while an image is opened after a crash.

use liveblk::testing::SimulatedDisk;

use super::*;

/// What the disks hold after a crash somewhere in a run; images are perhaps marked dirty, with
/// refcounts that are too low, as a writer of lazy refcounts leaves them.
fn crashed(plan: &Plan, operation: u64, dirty: bool) -> (Vec<VolatileStore>, Model) {
    let runtime = Runtime::simulated(plan.seed).expect("a simulated runtime");
    let handle = runtime.handle();
    let power = Power::new();
    let machine = runtime.block_on(async {
        let Plan {
            geometry,
            disk,
            size,
            seed,
            ..
        } = plan;
        let chain = Chain::create(&handle, &power, geometry, *disk, *size, *seed).await;
        let guest = chain.guest.clone();
        let model = Model::zeroed(*size);
        let workload = Workload::new(&handle, guest, model, plan.workload.clone(), *seed);
        Rc::new(RefCell::new(Machine { chain, workload }))
    });
    power.fail_after(operation);
    runtime.block_on(power.run(doings(machine.clone(), plan.clone())));
    let machine = machine.borrow();
    let mut random = Random::new(plan.seed ^ operation);
    let mut left = machine.chain.crash(&mut random);
    if dirty {
        left = left
            .iter()
            .map(|store| forget_counts(store, &mut random))
            .collect();
    }
    (left, machine.workload.model().clone())
}

/// The image with the dirty mark, and without some of its refcounts.
fn forget_counts(store: &VolatileStore, random: &mut Random) -> VolatileStore {
    let mut bytes = store.to_bytes();
    let number = |bytes: &[u8], at: usize| {
        let field = bytes[at..at + 8].try_into().expect("eight bytes");
        u64::from_be_bytes(field) as usize
    };
    let cluster = 1 << bytes[23];
    let table = number(&bytes, 48);
    let blocks: Vec<usize> = (table..table + cluster)
        .step_by(8)
        .map(|at| number(&bytes, at))
        .filter(|block| *block > 0)
        .collect();
    for block in blocks {
        let start = block + random.below(cluster as u64) as usize;
        let end = start + random.below((block + cluster - start) as u64 + 1) as usize;
        let end = end.min(bytes.len());
        bytes[start.min(end)..end].fill(0);
    }
    bytes[79] |= 1;
    VolatileStore::from_bytes(&bytes)
}

/// Opens the chain, reads all of it and changes a little; counts the operations. Power fails at the
/// operation given: then what is left.
fn open_again(
    plan: &Plan,
    left: &[VolatileStore],
    fail_after: Option<u64>,
) -> (u64, Result<Vec<u8>, Vec<VolatileStore>>) {
    let runtime = Runtime::simulated(plan.seed).expect("a simulated runtime");
    let handle = runtime.handle();
    let power = Power::new();
    let disks: Vec<SimulatedDisk> = left
        .iter()
        .map(|store| SimulatedDisk::new(&handle, &power, plan.disk, store.clone(), plan.seed))
        .collect();
    if let Some(operation) = fail_after {
        power.fail_after(operation);
    }
    let content = runtime.block_on(power.run(async {
        let chain = Chain::open_disks(&handle, &power, &plan.geometry, disks.clone(), plan.seed);
        let chain = chain.await.expect("what a crash left can be opened");
        let bytes = whole(&chain).await.expect("it can be read");
        chain.close().await.expect("no fault");
        bytes
    }));
    let mut random = Random::new(plan.seed ^ fail_after.unwrap_or(0) << 24);
    let outcome = match content {
        Some(bytes) => Ok(bytes),
        None => Err(disks.iter().map(|disk| disk.crash(&mut random)).collect()),
    };
    (power.operations(), outcome)
}

/// Whatever operation of an opening power fails at, the next one finds the same content.
fn second_crash(plan: &Plan, operation: u64, dirty: bool) -> Result<(), String> {
    let (left, mut model) = crashed(plan, operation, dirty);
    let (operations, content) = open_again(plan, &left, None);
    let Ok(content) = content else {
        unreachable!("power did not fail");
    };
    let judged = model.check_after_crash(&content);
    judged.map_err(|mismatch| mismatch.to_string())?;
    let step = (operations / 40).max(1) as usize;
    for again in (1..=operations).step_by(step) {
        let (_, outcome) = open_again(plan, &left, Some(again));
        let left = match outcome {
            Err(left) => left,
            Ok(_) => continue,
        };
        let (_, found) = open_again(plan, &left, None);
        if found.is_ok_and(|bytes| bytes != content) {
            return Err(format!(
                "other content after a second crash at {again} of {operations}"
            ));
        }
        restart(plan, left, model.clone(), again)
            .map_err(|wrong| format!("second crash at {again} of {operations}: {wrong}"))?;
    }
    Ok(())
}

#[test]
fn a_second_crash_while_opening_harms_nothing() {
    for_each_seed("a_second_crash_while_opening", 8, |seed| {
        let mut plan = Plan::draw(seed);
        plan.geometry.version = 3;
        plan.geometry.lazy_refcounts = true;
        // Refcounts of a byte and more are simple to forget.
        plan.geometry.refcount_bits = 8 << (seed % 4);
        plan.size = plan.size.min(256 << 10);
        for (number, operation) in [20, 60, 110].into_iter().enumerate() {
            if let Err(wrong) = second_crash(&plan, operation, number < 2) {
                panic!("first crash at {operation}: {wrong}\n{plan:?}");
            }
        }
    });
}
