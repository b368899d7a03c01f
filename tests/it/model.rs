//! Random requests to chains of qcow2 images, held against the reference model.

use liveblk::testing::{
    DiskOptions, Model, Power, Random, Workload, WorkloadOptions, for_each_seed, simulate,
};

use super::chain::{Chain, Geometry};

/// Bytes of the disk: several L2 tables of small clusters, a few clusters of large ones.
fn size(random: &mut Random, geometry: &Geometry) -> u64 {
    let sectors = (1 << geometry.cluster_bits >> 9) * (20 + random.below(200));
    let extra = random.below(3);
    (sectors + extra).min(4096) * 512
}

fn workload_options(random: &mut Random) -> WorkloadOptions {
    WorkloadOptions {
        depth: random.choose(&[1, 2, 4, 8, 16]),
        longest: random.choose(&[4096, 32 << 10, 256 << 10]),
        ..WorkloadOptions::default()
    }
}

/// Bursts of requests with snapshots, resizes and reopenings between them.
#[test]
fn chains_hold_against_the_model() {
    for_each_seed("chains_hold_against_the_model", 40, |seed| {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let geometry = Geometry::draw(&mut random);
            let size = size(&mut random, &geometry);
            let disk_options = DiskOptions {
                request_alignment: random.choose(&[1, 512, 4096]),
                native_fua: random.percent(50),
                write_zeroes: random.percent(70),
                ..DiskOptions::default()
            };
            let power = Power::new();
            let mut chain =
                Chain::create(&handle, &power, &geometry, disk_options, size, seed).await;
            let options = workload_options(&mut random);
            let guest = chain.guest.clone();
            let model = Model::zeroed(size);
            let mut workload = Workload::new(&handle, guest, model, options.clone(), seed);
            for round in 0..3 + random.below(5) {
                workload.run(20 + random.below(150)).await;
                match random.below(6) {
                    0 | 1 if chain.disks.len() < 5 => chain.snapshot().await.expect("no fault"),
                    2 => {
                        let sectors = (size / 512 / 2) + random.below(size / 512);
                        workload.resize(sectors * 512).await;
                    }
                    3 => {
                        chain.close().await.expect("no fault");
                        chain.assert_sound(false, "after closing").await;
                        let stores = chain.disks.iter().map(|disk| disk.store()).collect();
                        chain = Chain::open(&handle, &power, &geometry, disk_options, stores, seed)
                            .await
                            .expect("what was closed can be opened");
                        let model = workload.model().clone();
                        let guest = chain.guest.clone();
                        let again = seed ^ round << 32;
                        workload = Workload::new(&handle, guest, model, options.clone(), again);
                    }
                    4 => {
                        workload.flush().await;
                        chain.assert_sound(true, "after a flush").await;
                    }
                    _ => {}
                }
                workload.verify().await;
            }
            chain.close().await.expect("no fault");
            chain.assert_sound(false, "after closing").await;
        });
    });
}
