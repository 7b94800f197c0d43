//! virtio-blk disks as [`BlockDevice`]s.
//!
//! Requests are as large as 2 MiB, because a request costs about as much as 250 KiB of data, and each wakes the device once
//! more, on a host with two cores beside a core that polls. `stream` keeps [`DEPTH`] requests in flight into buffers of its
//! own, so that reading overlaps with what the caller does with the data, and the first of them can be in flight before it is
//! called (`read_ahead`); `read` does the same straight into the caller's buffer. Completion is polled, with naps in between:
//! the threads that serve the device may need the core of the host that the guest would spin on, and got it only at the end
//! of a time slice (2 to 5 ms). A device that does not answer within [`TIMEOUT_MS`] is reset, so that it can no longer write to
//! memory, and stays dead.
//!
//! Rings and transport are the `virtio-drivers` crate's.

use super::clock;
use super::pci::{self, PlacedDisk};
use crate::boot::gates;
use alloc::alloc::{alloc_zeroed, dealloc};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::alloc::Layout;
use core::ptr::NonNull;
use storage::{BlockDevice, DeviceError, SECTOR_BYTES, check_range};
use virtio_drivers::device::blk::{BlkReq, BlkResp, RespStatus, VirtIOBlk};
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::pci::bus::PciRoot;
use virtio_drivers::{BufferDirection, Error, Hal, PhysAddr};

/// Bytes of one request.
pub const REQUEST_BYTES: usize = 2 << 20;
/// Requests in flight.
pub const DEPTH: usize = 4;
/// TSC ticks a wait spins before it sleeps between looks at the device: small requests are done by then.
const SPIN_CYCLES: u64 = 60_000;
/// How long a request may take.
pub const TIMEOUT_MS: u32 = 30_000;

/// All memory is mapped at its physical address, and no IOMMU is in the way.
struct IdentityMapped;

fn dma_layout(pages: usize) -> Option<Layout> {
    Layout::from_size_align(pages.checked_mul(virtio_drivers::PAGE_SIZE)?, virtio_drivers::PAGE_SIZE).ok()
}

// SAFETY: heap memory is zeroed, page-aligned and exclusive; virtual and physical addresses are equal (boot/plan.rs), and
// the pages of BARs are mapped uncached.
unsafe impl Hal for IdentityMapped {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let layout = dma_layout(pages).expect("a queue has few pages");
        // SAFETY: the layout has a size.
        match NonNull::new(unsafe { alloc_zeroed(layout) }) {
            Some(place) => (place.as_ptr() as PhysAddr, place),
            None => alloc::alloc::handle_alloc_error(layout),
        }
    }

    unsafe fn dma_dealloc(_physical: PhysAddr, place: NonNull<u8>, pages: usize) -> i32 {
        if let Some(layout) = dma_layout(pages) {
            // SAFETY: from `dma_alloc` with the same number of pages.
            unsafe { dealloc(place.as_ptr(), layout) };
        }
        0
    }

    unsafe fn mmio_phys_to_virt(physical: PhysAddr, _len: usize) -> NonNull<u8> {
        NonNull::new(physical as *mut u8).expect("a BAR is not at address 0")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>() as PhysAddr
    }

    unsafe fn unshare(_physical: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

/// A function that could not be made a disk.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DiskError {
    /// The PCI side.
    #[error("virtio-blk at {place}: {reason}; use a modern virtio-blk-pci device")]
    Transport {
        /// Bus, device, function.
        place: alloc::string::String,
        /// What was wrong.
        reason: alloc::string::String,
    },
}

/// A virtio-blk disk.
pub struct VirtioDisk {
    /// `None` once the device timed out.
    device: Option<VirtIOBlk<IdentityMapped, PciTransport>>,
    sectors: u64,
    read_only: bool,
    slots: [Slot; DEPTH],
    /// Stream buffers, each made when a stream first needs it.
    buffers: [Option<Buffer>; DEPTH],
    /// The first chunks of a stream that is expected, chunk `n` in slot and buffer `n`.
    ahead: Vec<Flight>,
    timeout_ticks: u64,
}

/// Header and status of one request; the device reads and writes them while it is in flight.
struct Slot {
    request: Box<BlkReq>,
    response: Box<BlkResp>,
}

/// A piece of memory the device may be writing: only a pointer, never a reference, while a request is in flight.
#[derive(Clone, Copy)]
struct Buffer {
    start: NonNull<u8>,
    len: usize,
}

impl Buffer {
    fn of(bytes: &mut [u8]) -> Buffer {
        Buffer { start: NonNull::from(&mut *bytes).cast(), len: bytes.len() }
    }
}

/// A request in flight.
#[derive(Clone, Copy)]
struct Flight {
    token: u16,
    slot: usize,
    lba: u64,
    buffer: Buffer,
}

impl VirtioDisk {
    /// Starts the device of `disk`. Its waits are not bounded before [`VirtioDisk::set_clock`].
    ///
    /// # Errors
    /// [`DiskError`] when it is not a modern virtio device or refuses its queue.
    pub fn new(disk: &pci::Disk) -> Result<Self, DiskError> {
        use alloc::string::ToString;
        let failed = |reason: alloc::string::String| DiskError::Transport { place: disk.function.to_string(), reason };
        let mut root = PciRoot::new(PlacedDisk::new(disk));
        let transport = PciTransport::new::<IdentityMapped, _>(&mut root, disk.function.into())
            .map_err(|e| failed(alloc::format!("{e:?}")))?;
        let mut device = VirtIOBlk::<IdentityMapped, _>::new(transport).map_err(|e| failed(e.to_string()))?;
        device.disable_interrupts();
        Ok(Self {
            sectors: device.capacity(),
            read_only: device.readonly(),
            device: Some(device),
            slots: core::array::from_fn(|_| Slot { request: Box::default(), response: Box::default() }),
            buffers: [None; DEPTH],
            ahead: Vec::new(),
            timeout_ticks: u64::MAX,
        })
    }

    /// Bounds every wait to [`TIMEOUT_MS`] by a counter of `tsc_hz` ticks a second.
    pub fn set_clock(&mut self, tsc_hz: u64) {
        self.timeout_ticks = tsc_hz / 1000 * u64::from(TIMEOUT_MS);
    }

    fn submit(&mut self, slot: usize, lba: u64, buffer: Buffer, write: bool) -> Result<Flight, DeviceError> {
        let sectors = (buffer.len / SECTOR_BYTES) as u64;
        let device = self.device.as_mut().ok_or(timeout(lba, sectors))?;
        let Slot { request, response } = &mut self.slots[slot];
        // SAFETY: the slot is free, so nothing else uses its header and status until `complete`; the buffer is memory
        // that the caller keeps untouched until then. The slice exists only for this call.
        let token = unsafe {
            if write {
                let bytes = core::slice::from_raw_parts(buffer.start.as_ptr(), buffer.len);
                device.write_blocks_nb(lba as usize, request, bytes, response)
            } else {
                let bytes = core::slice::from_raw_parts_mut(buffer.start.as_ptr(), buffer.len);
                device.read_blocks_nb(lba as usize, request, bytes, response)
            }
        };
        token.map(|token| Flight { token, slot, lba, buffer }).map_err(|e| failed(lba, sectors, e))
    }

    /// Waits for one of `flights` and finishes it. Requests of one queue may complete in any order.
    fn wait(&mut self, flights: &mut Vec<Flight>, write: bool) -> Result<Flight, DeviceError> {
        let start = clock::tsc();
        loop {
            let Some(device) = self.device.as_mut() else {
                let (lba, sectors) = flights.first().map_or((0, 0), |f| (f.lba, (f.buffer.len / SECTOR_BYTES) as u64));
                return Err(timeout(lba, sectors));
            };
            let done = device.peek_used().and_then(|token| flights.iter().position(|f| f.token == token));
            let Some(index) = done else {
                if clock::tsc().wrapping_sub(start) > self.timeout_ticks {
                    // Dropping the driver resets the device: afterwards it cannot touch any buffer.
                    self.device = None;
                }
                rest(clock::tsc().wrapping_sub(start));
                continue;
            };
            let flight = flights.remove(index);
            let Slot { request, response } = &mut self.slots[flight.slot];
            // SAFETY: the same header, buffer and status as at submission; the device is done with them.
            let result = unsafe {
                if write {
                    let bytes = core::slice::from_raw_parts(flight.buffer.start.as_ptr(), flight.buffer.len);
                    device.complete_write_blocks(flight.token, request, bytes, response)
                } else {
                    let bytes = core::slice::from_raw_parts_mut(flight.buffer.start.as_ptr(), flight.buffer.len);
                    device.complete_read_blocks(flight.token, request, bytes, response)
                }
            };
            let sectors = (flight.buffer.len / SECTOR_BYTES) as u64;
            return match result {
                Ok(()) if response.status() == RespStatus::OK => Ok(flight),
                Ok(()) => Err(failed(flight.lba, sectors, Error::IoError)),
                Err(error) => Err(failed(flight.lba, sectors, error)),
            };
        }
    }

    /// Takes back every request in flight after an error, so that no buffer stays with the device.
    fn drain(&mut self, flights: &mut Vec<Flight>, write: bool) {
        while !flights.is_empty() && self.device.is_some() {
            let _ = self.wait(flights, write);
        }
    }

    /// Takes back what was read ahead for a stream that does not come, or not yet.
    fn forget_ahead(&mut self) {
        let mut ahead = core::mem::take(&mut self.ahead);
        self.drain(&mut ahead, false);
    }

    /// Moves `len` bytes between `lba`.. and the memory at `start`, several requests at a time.
    fn transfer(&mut self, lba: u64, start: NonNull<u8>, len: usize, write: bool) -> Result<(), DeviceError> {
        self.forget_ahead();
        let mut flights = Vec::with_capacity(DEPTH);
        let mut free: Vec<usize> = (0..DEPTH).collect();
        let mut at = 0;
        let result = loop {
            let step = if at < len { free.pop() } else { None };
            let moved = if let Some(slot) = step {
                let bytes = (len - at).min(REQUEST_BYTES);
                // SAFETY: `at` is below the length of the caller's memory.
                let buffer = Buffer { start: unsafe { start.add(at) }, len: bytes };
                let submitted = self.submit(slot, lba + (at / SECTOR_BYTES) as u64, buffer, write);
                at += bytes;
                submitted.map(|flight| flights.push(flight))
            } else if flights.is_empty() {
                break Ok(());
            } else {
                self.wait(&mut flights, write).map(|flight| free.push(flight.slot))
            };
            if let Err(error) = moved {
                break Err(error);
            }
        };
        self.drain(&mut flights, write);
        result
    }

    /// The buffer of stream chunks for `slot`, made when it is first needed.
    fn stream_buffer(&mut self, slot: usize) -> Buffer {
        *self.buffers[slot].get_or_insert_with(|| Buffer::of(alloc::vec![0; REQUEST_BYTES].leak()))
    }
}

/// A piece of a stream, read by one request.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Chunk {
    lba: u64,
    /// Bytes.
    len: usize,
}

/// The chunks of a stream of `len_bytes` from sector `lba` on.
fn chunks(lba: u64, len_bytes: u64) -> impl Iterator<Item = Chunk> {
    (0..len_bytes).step_by(REQUEST_BYTES).map(move |offset| Chunk {
        lba: lba + offset / SECTOR_BYTES as u64,
        len: (len_bytes - offset).min(REQUEST_BYTES as u64) as usize,
    })
}

/// One turn of a wait for the device that has lasted `waited` TSC ticks: what serves it may need this very core of the host.
fn rest(waited: u64) {
    if waited < SPIN_CYCLES || gates::nap().is_err() {
        core::hint::spin_loop();
    }
}

fn timeout(lba: u64, sectors: u64) -> DeviceError {
    DeviceError::Timeout { lba, sectors, timeout_ms: TIMEOUT_MS }
}

/// The status byte behind the driver's error, or a negative number for a refusal of its own.
fn failed(lba: u64, sectors: u64, error: Error) -> DeviceError {
    let status = match error {
        Error::IoError => 1,
        Error::Unsupported => 2,
        Error::NotReady => 3,
        Error::QueueFull => -1,
        Error::WrongToken => -2,
        Error::DmaError => -3,
        _ => -4,
    };
    DeviceError::Failed { lba, sectors, status }
}

impl BlockDevice for VirtioDisk {
    fn len_bytes(&self) -> u64 {
        self.sectors * SECTOR_BYTES as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&mut self, lba: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, buf.len() as u64)?;
        self.transfer(lba, NonNull::from(&mut *buf).cast(), buf.len(), false)
    }

    fn write(&mut self, lba: u64, buf: &[u8]) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, buf.len() as u64)?;
        if self.read_only {
            return Err(DeviceError::ReadOnly { lba });
        }
        self.transfer(lba, NonNull::from(buf).cast(), buf.len(), true)
    }

    /// Not bounded in time: the driver crate sends a flush only by waiting for it, and has no form that could be given up.
    fn flush(&mut self) -> Result<(), DeviceError> {
        self.forget_ahead();
        let device = self.device.as_mut().ok_or(timeout(0, 0))?;
        device.flush().map_err(|error| failed(0, 0, error))
    }

    fn read_ahead(&mut self, lba: u64, len_bytes: u64) {
        self.forget_ahead();
        if check_range(self.len_bytes(), lba, len_bytes).is_err() {
            return;
        }
        for (slot, chunk) in chunks(lba, len_bytes).take(DEPTH).enumerate() {
            let buffer = Buffer { len: chunk.len, ..self.stream_buffer(slot) };
            match self.submit(slot, chunk.lba, buffer, false) {
                Ok(flight) => self.ahead.push(flight),
                Err(_) => return self.forget_ahead(),
            }
        }
    }

    fn stream(&mut self, lba: u64, len_bytes: u64, sink: &mut dyn FnMut(&[u8])) -> Result<(), DeviceError> {
        check_range(self.len_bytes(), lba, len_bytes)?;
        // Chunk `n` uses slot and buffer `n % DEPTH`; a finished chunk waits in `ready` for its turn.
        let mut ready: [Option<Flight>; DEPTH] = [None; DEPTH];
        let expected = |flights: &[Flight]| {
            let mut wanted = chunks(lba, len_bytes);
            flights.iter().all(|f| wanted.next() == Some(Chunk { lba: f.lba, len: f.buffer.len }))
        };
        if !expected(&self.ahead) {
            self.forget_ahead();
        }
        let mut flights = core::mem::take(&mut self.ahead);
        let count = len_bytes.div_ceil(REQUEST_BYTES as u64);
        let (mut submitted, mut delivered) = (flights.len() as u64, 0u64);
        let mut waiting = chunks(lba, len_bytes).skip(flights.len());
        let result = loop {
            if delivered == count {
                break Ok(());
            }
            if submitted < delivered + DEPTH as u64
                && let Some(chunk) = waiting.next()
            {
                let slot = (submitted % DEPTH as u64) as usize;
                let buffer = Buffer { len: chunk.len, ..self.stream_buffer(slot) };
                match self.submit(slot, chunk.lba, buffer, false) {
                    Ok(flight) => flights.push(flight),
                    Err(error) => break Err(error),
                }
                submitted += 1;
                continue;
            }
            let slot = (delivered % DEPTH as u64) as usize;
            if let Some(flight) = ready[slot].take() {
                // SAFETY: the request is complete, so the device has left the buffer, and it is submitted again only
                // after `sink` returned.
                sink(unsafe { core::slice::from_raw_parts(flight.buffer.start.as_ptr(), flight.buffer.len) });
                delivered += 1;
                continue;
            }
            match self.wait(&mut flights, false) {
                Ok(flight) => ready[flight.slot] = Some(flight),
                Err(error) => break Err(error),
            }
        };
        self.drain(&mut flights, false);
        result
    }
}
