//! The one integration test binary: a module per topic.

mod imports;
mod layers;
mod source;
mod style;
