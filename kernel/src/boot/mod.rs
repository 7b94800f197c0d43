//! From the loader to sealed page tables.
//!
//! Data path: PVH or Multiboot2 loader -> `entry.s` (ring 0) -> `early` (ring 3): loader facts ([`info`], [`acpi`]) ->
//! memory plan ([`plan`]) -> page tables ([`paging`]) -> seal (`gates`) -> `platform`.
//!
//! What is computed here (`info`, `acpi`, `plan`, `paging`, `area`) is plain Rust over values and is tested on the host;
//! what touches the machine is in `entry.s`, `early`, `gates` and `cores`.

pub mod acpi;
pub mod area;
#[cfg(feature = "bare-metal")]
mod cores;
#[cfg(feature = "bare-metal")]
pub mod early;
pub mod fixed;
#[cfg(feature = "bare-metal")]
pub mod gates;
pub mod info;
pub mod paging;
pub mod plan;
