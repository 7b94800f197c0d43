//! Ed25519 signatures of model files: who made the model, checked before anything of it is parsed.
//!
//! Input: the configured public key, the 64 bytes of a signature file, and the model's bytes in order, once. Output: yes, or
//! the error to give. The signature is of the bytes themselves (pure Ed25519, no hash in front), as `openssl pkeyutl -sign
//! -rawin` makes it; the verifier takes the message in pieces, which pure Ed25519 allows when only checking.
//! Not here: signing, key files, trust in the key (who writes the settings chooses it), and the tokenizer file of a
//! llama2.c model, which no signature covers.
//!
//! Without the feature `signature` (the native image) [`Check::new`] refuses.
//!
//! # Source
//! RFC 8032, section 5.1.7, without multiplying by the cofactor; keys of small order are refused.

use crate::error::RunError;

/// Bytes of a signature.
#[cfg(feature = "signature")]
const SIGNATURE_BYTES: usize = 64;

/// True where signatures can be checked.
pub const CAN_CHECK: bool = cfg!(feature = "signature");

/// A signature that is being checked.
#[cfg(feature = "signature")]
pub struct Check {
    verifier: ed25519_dalek::StreamVerifier,
    model_bytes: u64,
}

#[cfg(feature = "signature")]
impl Check {
    /// Starts to check that `signature` is one of the holder of `public_key`.
    ///
    /// # Errors
    /// [`RunError::BadPublicKey`], [`RunError::SignatureLength`], or [`RunError::WrongSignature`] for one that fits no bytes.
    pub fn new(public_key: &[u8; 32], signature: &[u8]) -> Result<Self, RunError> {
        use ed25519_dalek::{Signature, VerifyingKey};
        let key = VerifyingKey::from_bytes(public_key).ok().filter(|key| !key.is_weak());
        let key = key.ok_or(RunError::BadPublicKey)?;
        let found_bytes = signature.len();
        let signature: &[u8; SIGNATURE_BYTES] =
            signature.try_into().map_err(|_| RunError::SignatureLength { found_bytes })?;
        let wrong = |_| RunError::WrongSignature { model_bytes: 0 };
        let verifier = key.verify_stream(&Signature::from_bytes(signature)).map_err(wrong)?;
        Ok(Self { verifier, model_bytes: 0 })
    }

    /// Takes in the next bytes of the model.
    pub fn update(&mut self, bytes: &[u8]) {
        self.verifier.update(bytes);
        self.model_bytes += bytes.len() as u64;
    }

    /// Decides.
    ///
    /// # Errors
    /// [`RunError::WrongSignature`].
    pub fn finish(self) -> Result<(), RunError> {
        let Self { verifier, model_bytes } = self;
        verifier.finalize_and_verify().map_err(|_| RunError::WrongSignature { model_bytes })
    }
}

/// None can be checked in this image.
#[cfg(not(feature = "signature"))]
pub enum Check {}

#[cfg(not(feature = "signature"))]
impl Check {
    /// Refuses.
    ///
    /// # Errors
    /// [`RunError::NoSignatureCheck`].
    pub fn new(_public_key: &[u8; 32], _signature: &[u8]) -> Result<Self, RunError> {
        Err(RunError::NoSignatureCheck)
    }

    /// Never called.
    pub fn update(&mut self, _bytes: &[u8]) {
        match *self {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn finish(self) -> Result<(), RunError> {
        match self {}
    }
}

#[cfg(all(test, feature = "signature"))]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec::Vec;

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
    }

    fn check(key: &str, message: &[u8], signature: &[u8], piece: usize) -> Result<(), RunError> {
        let mut check = Check::new(bytes(key).as_slice().try_into().unwrap(), signature)?;
        message.chunks(piece).for_each(|piece| check.update(piece));
        check.finish()
    }

    /// Key, message, signature. The first three: RFC 8032, section 7.1, tests 1 to 3.
    const VECTORS: [(&str, &str, &str); 3] = [
        (
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        ),
        (
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            "af82",
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
        ),
    ];

    #[test]
    fn the_vectors_of_the_standard_hold_and_no_bit_may_change() {
        for (key, message, signature) in VECTORS {
            let (message, signature) = (bytes(message), bytes(signature));
            check(key, &message, &signature, 1).unwrap();
            for at in 0..8 * SIGNATURE_BYTES {
                let mut other = signature.clone();
                other[at / 8] ^= 1 << (at % 8);
                let error = check(key, &message, &other, 1).unwrap_err();
                assert!(matches!(error, RunError::WrongSignature { .. }), "bit {at}: {error}");
            }
            let longer = [&message[..], &[0]].concat();
            let error = check(key, &longer, &signature, 1).unwrap_err();
            assert!(matches!(error, RunError::WrongSignature { model_bytes } if model_bytes == longer.len() as u64));
        }
    }

    /// `openssl pkeyutl -sign -rawin` over 1024 bytes, `i * 7 mod 251` each, in whatever pieces they come.
    #[test]
    fn openssl_signs_what_is_checked_here() {
        const KEY: &str = "781f11da7e7f20e54eab975abcdd8b1a37207b7ac4060de631ba55fe940433be";
        const SIGNATURE: &str = "2629b5b97e6490922a44a3441e47e133907679d176f6190a4d0199f0c10797a439d47fb669471b5d4aa51bda1d9929898df222e3862d1bda2aff38282c457b05";
        let message: Vec<u8> = (0..1024u32).map(|i| (i * 7 % 251) as u8).collect();
        for piece in [1, 127, 128, 129, 1024] {
            check(KEY, &message, &bytes(SIGNATURE), piece).unwrap();
        }
        let other_key = VECTORS[0].0;
        let error = check(other_key, &message, &bytes(SIGNATURE), 1024).unwrap_err();
        assert!(error.to_string().contains("1024 bytes"), "{error}");
    }

    #[test]
    fn what_is_no_key_or_no_signature_is_said() {
        let (key, message, signature) = VECTORS[1];
        let (message, signature) = (bytes(message), bytes(signature));
        for found in [0, 63, 65, 128] {
            let error = check(key, &message, &signature.repeat(2)[..found], 1).unwrap_err();
            assert!(matches!(error, RunError::SignatureLength { found_bytes } if found_bytes == found), "{error}");
        }
        // Not on the curve; and the neutral element, to which any signature could be made fit.
        for key in ["02".to_string() + &"00".repeat(31), "01".to_string() + &"00".repeat(31)] {
            let error = check(&key, &message, &signature, 1).unwrap_err();
            assert!(matches!(error, RunError::BadPublicKey), "{error}");
        }
    }
}
