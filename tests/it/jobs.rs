//! Jobs over chains of images on simulated disks: random ones against the reference model, crash and fault
//! sweeps, and the engine's verbs, policies and limits in virtual time.

mod backup;
mod crash;
mod engine;
mod faults;
mod incremental;
mod mirror;
mod model;
mod plan;
mod regressions;
mod stage;
