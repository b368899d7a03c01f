//! Random requests to chains of qcow2 images, held against the reference model.

use liveblk::runtime::Handle;
use liveblk::testing::{
    DiskOptions, Model, Power, Random, VolatileStore, Workload, WorkloadOptions, for_each_seed,
    simulate,
};

use super::chain::{Chain, Geometry, check_disk};
use super::compressed::compress_some;

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

/// A chain, what it should hold, and how it goes on after it was closed.
struct Trial {
    handle: Handle,
    power: Power,
    geometry: Geometry,
    disk_options: DiskOptions,
    options: WorkloadOptions,
    size: u64,
    seed: u64,
    random: Random,
    chain: Chain,
    workload: Workload,
}

impl Trial {
    /// A new image that reads as zeroes.
    async fn new(handle: &Handle, seed: u64) -> Trial {
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
        let chain = Chain::create(handle, &power, &geometry, disk_options, size, seed).await;
        let options = workload_options(&mut random);
        let guest = chain.guest.clone();
        let workload = Workload::new(handle, guest, Model::zeroed(size), options.clone(), seed);
        Trial {
            handle: handle.clone(),
            power,
            geometry,
            disk_options,
            options,
            size,
            seed,
            random,
            chain,
            workload,
        }
    }

    /// Closes the chain, without a leak, and opens it again on what `change` makes of its disks.
    async fn reopen(&mut self, again: u64, change: impl FnMut(VolatileStore) -> VolatileStore) {
        self.chain.close().await.expect("no fault");
        self.chain.assert_sound(false, "after closing").await;
        let disks = self.chain.disks.iter();
        let stores = disks.map(|disk| disk.store()).map(change).collect();
        let (handle, power, geometry) = (&self.handle, &self.power, &self.geometry);
        self.chain = Chain::open(
            handle,
            power,
            geometry,
            self.disk_options,
            stores,
            self.seed,
        )
        .await
        .expect("what was closed can be opened");
        let model = self.workload.model().clone();
        let guest = self.chain.guest.clone();
        let seed = self.seed ^ again << 32;
        self.workload = Workload::new(handle, guest, model, self.options.clone(), seed);
    }

    /// Bursts of requests with snapshots, resizes and reopenings between them.
    async fn bursts(&mut self) {
        for round in 0..3 + self.random.below(5) {
            self.workload.run(20 + self.random.below(150)).await;
            match self.random.below(6) {
                0 | 1 if self.chain.disks.len() < 5 => {
                    self.chain.snapshot().await.expect("no fault");
                }
                2 => {
                    let sectors = (self.size / 512 / 2) + self.random.below(self.size / 512);
                    self.workload.resize(sectors * 512).await;
                }
                3 => self.reopen(round, |store| store).await,
                4 => {
                    self.workload.flush().await;
                    self.chain.assert_sound(true, "after a flush").await;
                }
                _ => {}
            }
            self.workload.verify().await;
        }
        self.chain.close().await.expect("no fault");
        self.chain.assert_sound(false, "after closing").await;
    }
}

#[test]
fn chains_hold_against_the_model() {
    for_each_seed("chains_hold_against_the_model", 40, |seed| {
        simulate(seed, |handle| async move {
            Trial::new(&handle, seed).await.bursts().await;
        });
    });
}

/// The same, where half of the first layer's data is compressed.
#[test]
fn compressed_clusters_hold_against_the_model() {
    let mut compressed = 0;
    for_each_seed("compressed_clusters_hold", 30, |seed| {
        compressed += simulate(seed, |handle| async move {
            let mut trial = Trial::new(&handle, seed).await;
            trial.workload.run(100).await;
            let mut random = Random::new(seed ^ 0xc0);
            trial
                .reopen(77, |store| compress_some(&store, &mut random))
                .await;
            trial.chain.assert_sound(false, "after compressing").await;
            let found = check_disk(&trial.chain.disks[0]).await.expect("a header");
            trial.workload.verify().await;
            trial.bursts().await;
            found.compressed_clusters
        });
    });
    assert!(compressed > 0, "no cluster was ever compressed");
}
