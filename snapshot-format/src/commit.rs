//! Two slots, written in turn.
//!
//! One rule, used by [`open`] and by [`save`]: of the slots whose header is whole and names this model, the one with the
//! newest generation whose payload is whole is *the* snapshot. [`open`] returns it; [`save`] writes the other slot.
//! So whatever happens during a save, *the* snapshot stays what it was until the last header write makes the new one newer.

use crate::header::{HEADER_BYTES, Header, Identity, MAX_GENERATION, MAX_PAYLOAD_BYTES};
use crate::reason::{CodeUse, ColdStart, ForeignCode, SaveError, SlotReason};
use crate::schema::{ModelFile, Snapshot};
use alloc::vec;
use sha2::{Digest, Sha256};
use storage::{SECTOR_BYTES, StorageError};

/// One of the two slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slot {
    /// `SNAPA.BIN`.
    A,
    /// `SNAPB.BIN`.
    B,
}

impl Slot {
    /// Both.
    pub const ALL: [Slot; 2] = [Slot::A, Slot::B];

    /// The one that is not this one.
    pub fn other(self) -> Slot {
        match self {
            Slot::A => Slot::B,
            Slot::B => Slot::A,
        }
    }

    /// Name of its file on the boot volume.
    pub fn file_name(self) -> &'static str {
        match self {
            Slot::A => "SNAPA.BIN",
            Slot::B => "SNAPB.BIN",
        }
    }
}

/// Where the slots are. Offsets are bytes from the start of the slot.
pub trait Medium {
    /// Length of a slot in bytes.
    ///
    /// # Errors
    /// [`StorageError::NotFound`] when the slot does not exist, or why it cannot be used.
    fn slot_len_bytes(&self, slot: Slot) -> Result<u64, StorageError>;

    /// True when every write will be refused.
    fn read_only(&self) -> bool;

    /// Fills `buf` from byte `offset` of `slot` on.
    ///
    /// # Errors
    /// The storage error.
    fn read(&mut self, slot: Slot, offset: u64, buf: &mut [u8]) -> Result<(), StorageError>;

    /// Writes `bytes` (whole sectors at a sector boundary) from byte `offset` of `slot` on.
    ///
    /// # Errors
    /// The storage error; the sectors then hold old, new or (one of them) mixed bytes.
    fn write(&mut self, slot: Slot, offset: u64, bytes: &[u8]) -> Result<(), StorageError>;

    /// Returns when every earlier write is durable.
    ///
    /// # Errors
    /// The storage error.
    fn flush(&mut self) -> Result<(), StorageError>;
}

/// A snapshot that can be used.
#[derive(Clone, PartialEq, Debug)]
pub struct Opened {
    /// Its content; without machine code unless `code` is [`CodeUse::Full`].
    pub snapshot: Snapshot,
    /// Which save it is.
    pub generation: u64,
    /// Where it was.
    pub slot: Slot,
    /// Whether its machine code may be used.
    pub code: CodeUse,
    /// What is wrong with the other slot; `None` when it looks like an older snapshot of this model.
    pub passed_over: Option<SlotReason>,
}

/// A save that is durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Saved {
    /// Its generation.
    pub generation: u64,
    /// The slot written.
    pub slot: Slot,
    /// Bytes of the payload.
    pub payload_bytes: u64,
}

/// What the first sector of a slot says.
type Examined = Result<Header, SlotReason>;

/// Generation of any header that is whole, this build's format or not; 0 when there is none.
fn generation(examined: &Examined) -> u64 {
    match examined {
        Ok(header) => header.generation,
        Err(SlotReason::OtherFormat { generation, .. }) => *generation,
        Err(_) => 0,
    }
}

/// Opens *the* snapshot (see the module docs) for the image `identity`.
///
/// # Errors
/// [`ColdStart`] with each slot's reason when there is none.
pub fn open(medium: &mut dyn Medium, identity: &Identity) -> Result<Opened, ColdStart> {
    let slots = Slot::ALL.map(|slot| examine(medium, slot));
    let Picked { slot, header, mut snapshot, passed_over } = pick(medium, identity, &slots)?;
    let code = if header.identity.machine != identity.machine {
        snapshot.drop_code();
        snapshot.drop_measurements();
        let (found, expected) = (header.identity.machine, identity.machine);
        CodeUse::ProfileOnly(ForeignCode::OtherMachine { found, expected })
    } else if header.identity.build_id != identity.build_id {
        snapshot.drop_code();
        let (found, expected) = (header.identity.build_id, identity.build_id);
        CodeUse::ProfileOnly(ForeignCode::OtherBuild { found, expected })
    } else {
        CodeUse::Full
    };
    Ok(Opened { snapshot, generation: header.generation, slot, code, passed_over })
}

/// Opens the newest whole snapshot of whatever build, CPU and model, with the identity it was saved under: for tools that look at
/// snapshots and do not run them.
///
/// # Errors
/// [`ColdStart`] with each slot's reason when there is none.
pub fn open_any(medium: &mut dyn Medium) -> Result<(Opened, Identity), ColdStart> {
    let [a, b] = Slot::ALL.map(|slot| examine(medium, slot).ok());
    let rank = |header: &Option<Header>| header.as_ref().map(|header| (header.committed, header.generation));
    let (newer, older) = if rank(&b) > rank(&a) { (b, a) } else { (a, b) };
    // No header: nothing has this identity, and opening it says what is wrong with each slot.
    let nobody = Identity { build_id: [0; 32], model_id: [0; 32], machine: [0; 32] };
    let identity = newer.map_or(nobody, |header| header.identity);
    match (open(medium, &identity), older) {
        (Ok(opened), _) => Ok((opened, identity)),
        // What is wrong with the newer one does not concern an older one of another model.
        (Err(cold), Some(older)) if older.identity.model_id != identity.model_id => {
            open(medium, &older.identity).map(|opened| (opened, older.identity)).map_err(|_| cold)
        }
        (Err(cold), _) => Err(cold),
    }
}

/// [`Snapshot::model_file`] of the newest snapshot, of whatever build, CPU and model: read from the headers alone, for who has
/// to know whether a model's hash is remembered before it is known which model it is.
pub fn newest_model_file(medium: &mut dyn Medium) -> Option<ModelFile> {
    let headers = Slot::ALL.map(|slot| examine(medium, slot).ok());
    let committed = headers.into_iter().flatten().filter(|header| header.committed);
    committed.max_by_key(|header| header.generation)?.model_file
}

/// Writes `snapshot` to the slot that is not *the* snapshot's (see the module docs) and makes it durable.
///
/// # Errors
/// [`SaveError`]; *the* snapshot is then what it was before. Only [`SaveError::Write`] leaves anything written; if it is
/// the last flush that failed, the new snapshot may be the one the next boot opens.
///
/// # Panics
/// Never in practice: every [`Snapshot`] serialises.
pub fn save(medium: &mut dyn Medium, identity: &Identity, snapshot: &Snapshot) -> Result<Saved, SaveError> {
    if medium.read_only() {
        return Err(SaveError::ReadOnly);
    }
    if !snapshot.is_within_limits() {
        let trials = snapshot.entries.iter().map(|record| record.trials.len()).max().unwrap_or(0);
        return Err(SaveError::TooMany { keys: snapshot.entries.len(), trials });
    }
    let slots = Slot::ALL.map(|slot| examine(medium, slot));
    let slot = match pick(medium, identity, &slots) {
        Ok(picked) => picked.slot.other(),
        Err(_) => least_worth(&slots),
    };
    let newest = slots.iter().map(generation).max().unwrap_or(0);
    if newest >= MAX_GENERATION {
        return Err(SaveError::LastGeneration { generation: newest });
    }
    let slot_bytes = match medium.slot_len_bytes(slot) {
        Ok(len_bytes) => len_bytes,
        Err(StorageError::NotFound { .. }) => return Err(SaveError::NoSlotFile { slot }),
        Err(error) => return Err(SaveError::Write { slot, error }),
    };
    let mut payload = postcard::to_allocvec(snapshot).expect("snapshots hold only serialisable types");
    let header = Header {
        generation: newest + 1,
        committed: false,
        payload_bytes: payload.len() as u64,
        payload_sha256: Sha256::digest(&payload).into(),
        identity: *identity,
        model_file: snapshot.model_file,
    };
    // Whole sectors, so that nothing has to be read back and the tail of an older payload does not linger in the last one.
    payload.resize(payload.len().next_multiple_of(SECTOR_BYTES), 0);
    let need_bytes = (HEADER_BYTES + payload.len()) as u64;
    let have_bytes = slot_bytes.min(HEADER_BYTES as u64 + MAX_PAYLOAD_BYTES);
    if need_bytes > have_bytes {
        return Err(SaveError::TooLarge { slot, need_bytes, have_bytes });
    }
    commit(medium, slot, &header, &payload).map_err(|error| SaveError::Write { slot, error })?;
    Ok(Saved { generation: header.generation, slot, payload_bytes: header.payload_bytes })
}

/// The write order of the module docs of [`crate::header`].
fn commit(medium: &mut dyn Medium, slot: Slot, header: &Header, payload: &[u8]) -> Result<(), StorageError> {
    medium.write(slot, 0, &header.encode())?;
    medium.flush()?;
    medium.write(slot, HEADER_BYTES as u64, payload)?;
    medium.flush()?;
    medium.write(slot, 0, &Header { committed: true, ..*header }.encode())?;
    medium.flush()
}

/// The slot to write when neither is usable: one that exists, then the older.
fn least_worth(slots: &[Examined; 2]) -> Slot {
    let worth = |examined: &Examined| (*examined == Err(SlotReason::NoFile), generation(examined));
    let [a, b] = slots;
    if worth(a) <= worth(b) { Slot::A } else { Slot::B }
}

fn examine(medium: &mut dyn Medium, slot: Slot) -> Examined {
    let len_bytes = medium.slot_len_bytes(slot).map_err(unreadable)?;
    if len_bytes < (HEADER_BYTES + SECTOR_BYTES) as u64 {
        return Err(SlotReason::TooSmall { len_bytes });
    }
    let mut sector = [0; HEADER_BYTES];
    medium.read(slot, 0, &mut sector).map_err(unreadable)?;
    Header::decode(&sector)
}

fn unreadable(error: StorageError) -> SlotReason {
    match error {
        StorageError::NotFound { .. } => SlotReason::NoFile,
        error => SlotReason::Unreadable(error),
    }
}

/// *The* snapshot.
struct Picked {
    slot: Slot,
    header: Header,
    snapshot: Snapshot,
    passed_over: Option<SlotReason>,
}

fn pick(medium: &mut dyn Medium, identity: &Identity, slots: &[Examined; 2]) -> Result<Picked, ColdStart> {
    let [a, b] = slots;
    let newer = if generation(b) > generation(a) { Slot::B } else { Slot::A };
    let (newer_header, older_header) = if newer == Slot::A { (a, b) } else { (b, a) };
    let mut attempt = |slot, examined: &Examined| {
        let header = examined.clone()?;
        Ok((header, load(medium, slot, &header, identity)?))
    };
    let newer_reason = match attempt(newer, newer_header) {
        Ok((header, snapshot)) => {
            // The other slot's payload is not read for this: it is older either way.
            let passed_over = match older_header {
                Ok(header) => header_reason(header, identity),
                Err(reason) => Some(reason.clone()),
            };
            return Ok(Picked { slot: newer, header, snapshot, passed_over });
        }
        Err(reason) => reason,
    };
    match attempt(newer.other(), older_header) {
        Ok((header, snapshot)) => Ok(Picked { slot: newer.other(), header, snapshot, passed_over: Some(newer_reason) }),
        Err(older_reason) if newer == Slot::A => Err(ColdStart::new(newer_reason, older_reason)),
        Err(older_reason) => Err(ColdStart::new(older_reason, newer_reason)),
    }
}

/// What a whole header says against its slot.
fn header_reason(header: &Header, identity: &Identity) -> Option<SlotReason> {
    let generation = header.generation;
    if !header.committed {
        Some(SlotReason::Torn { generation, payload_bytes: header.payload_bytes })
    } else if header.identity.model_id != identity.model_id {
        let (found, expected) = (header.identity.model_id, identity.model_id);
        Some(SlotReason::OtherModel { generation, found, expected })
    } else {
        None
    }
}

/// Reads, checks and decodes the payload of `slot`.
fn load(medium: &mut dyn Medium, slot: Slot, header: &Header, identity: &Identity) -> Result<Snapshot, SlotReason> {
    if let Some(reason) = header_reason(header, identity) {
        return Err(reason);
    }
    let (generation, payload_bytes) = (header.generation, header.payload_bytes);
    let slot_bytes = medium.slot_len_bytes(slot).map_err(unreadable)?;
    let limit_bytes = slot_bytes.saturating_sub(HEADER_BYTES as u64).min(MAX_PAYLOAD_BYTES);
    if payload_bytes > limit_bytes {
        return Err(SlotReason::PayloadTooLong { payload_bytes, limit_bytes });
    }
    let mut payload = vec![0; payload_bytes as usize];
    medium.read(slot, HEADER_BYTES as u64, &mut payload).map_err(unreadable)?;
    let found: [u8; 32] = Sha256::digest(&payload).into();
    if found != header.payload_sha256 {
        return Err(SlotReason::PayloadDamaged { generation, expected: header.payload_sha256, found });
    }
    let snapshot = match postcard::take_from_bytes::<Snapshot>(&payload) {
        Ok((snapshot, [])) if snapshot.is_within_limits() => snapshot,
        _ => return Err(SlotReason::Schema { generation, payload_bytes }),
    };
    let damaged = |kernel: &crate::schema::StoredKernel| !kernel.code.is_empty() && !kernel.is_intact();
    match snapshot.entries.iter().find(|record| record.incumbent.as_ref().is_some_and(damaged)) {
        Some(record) => Err(SlotReason::CodeDamaged { generation, key: record.key }),
        None => Ok(snapshot),
    }
}
