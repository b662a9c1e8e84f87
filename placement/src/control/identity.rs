//! Who may speak: a certificate authority that lives as long as the run, in the driver's memory.
//!
//! A worker that the driver starts gets a certificate for its rank over stdin. Workers that a scheduler starts share one
//! for any rank, in a file that only its owner can read; whoever holds it is a worker of this run. Secrets are never in
//! arguments or the environment, which others can read.

use std::fmt;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use echelon_core::whole_file::WholeFile;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::error::ControlError;

/// The driver's name in its certificate.
const DRIVER: &str = "driver.echelon";
/// In the certificate of a worker that may have any rank.
const ANY_RANK: &str = "any-rank.worker.echelon";
/// Credentials are some 2 KiB.
const CREDENTIALS_BYTES: u64 = 64 << 10;

/// Signs the certificates of one run. Its key never leaves this value.
pub struct RunAuthority {
    issuer: Issuer<'static, KeyPair>,
    /// PEM.
    certificate: String,
}

/// What a worker needs to join: the run's authority, its own certificate and key, as PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    authority: String,
    certificate: String,
    key: String,
}

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Driver,
    Rank(u32),
    AnyRank,
}

impl RunAuthority {
    /// A new one; every run has its own.
    ///
    /// # Errors
    /// The system has no randomness to give.
    pub fn new() -> Result<RunAuthority, ControlError> {
        let key = KeyPair::generate().map_err(certificates)?;
        let mut params = CertificateParams::new(Vec::new()).map_err(certificates)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, "echelon run");
        let certificate = params.self_signed(&key).map_err(certificates)?.pem();
        Ok(RunAuthority { issuer: Issuer::new(params, key), certificate })
    }

    /// Credentials of a worker with this rank, or of any worker.
    ///
    /// # Errors
    /// The system has no randomness to give.
    pub fn worker(&self, rank: Option<u32>) -> Result<Credentials, ControlError> {
        self.issue(rank.map_or(Scope::AnyRank, Scope::Rank))
    }

    fn issue(&self, scope: Scope) -> Result<Credentials, ControlError> {
        let key = KeyPair::generate().map_err(certificates)?;
        let mut params = CertificateParams::new(vec![name(scope)]).map_err(certificates)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // A worker's certificate cannot pose as the driver.
        params.extended_key_usages = vec![match scope {
            Scope::Driver => ExtendedKeyUsagePurpose::ServerAuth,
            _ => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        let certificate = params.signed_by(&key, &self.issuer).map_err(certificates)?.pem();
        Ok(Credentials { authority: self.certificate.clone(), certificate, key: key.serialize_pem() })
    }

    /// TLS of the driver's end: 1.3 only, a certificate of this run demanded, nothing remembered between connections.
    pub(super) fn server_config(&self) -> Result<Arc<ServerConfig>, ControlError> {
        let (roots, chain, key) = self.issue(Scope::Driver)?.parse()?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(certificates)?
            .with_client_cert_verifier(verifier.build().map_err(certificates)?)
            .with_single_cert(chain, key)
            .map_err(certificates)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

impl Credentials {
    /// Writes them where only this user can read them, in one move: a reader never sees half of them.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn write(&self, path: &Path) -> Result<(), ControlError> {
        let failed = |error: io::Error| ControlError::Credentials { path: path.into(), cause: error.to_string() };
        let write = || {
            let mut file = WholeFile::create(path, 0o600)?;
            file.write_all(self.text().as_bytes())?;
            file.finish()
        };
        write().map_err(failed)
    }

    /// Reads what [`Credentials::write`] wrote.
    ///
    /// # Errors
    /// No such file, one that others can read, or one with something else in it.
    pub fn read(path: &Path) -> Result<Credentials, ControlError> {
        let failed = |cause: String| ControlError::Credentials { path: path.into(), cause };
        let file = fs::File::open(path).map_err(|error| failed(error.to_string()))?;
        let mode = file.metadata().map_err(|error| failed(error.to_string()))?.permissions().mode();
        if mode & 0o077 != 0 {
            let advice = format!("others may read it (mode {:o}); make it yours alone with chmod 600", mode & 0o777);
            return Err(failed(advice));
        }
        Credentials::receive(file).map_err(|error| failed(error.to_string()))
    }

    /// Reads them from a pipe, up to the end of the key: the pipe may stay open.
    ///
    /// # Errors
    /// The pipe ends early, or carries something else.
    pub fn receive(from: impl Read) -> io::Result<Credentials> {
        let mut text = String::new();
        let mut lines = BufReader::new(from.take(CREDENTIALS_BYTES));
        loop {
            let begin = text.len();
            if lines.read_line(&mut text)? == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "credentials end before the private key does",
                ));
            }
            let line = &text[begin..];
            if line.starts_with("-----END") && line.contains("PRIVATE KEY") {
                break;
            }
        }
        let sections: Vec<&str> = text.split_inclusive("-----END CERTIFICATE-----").collect();
        let [authority, certificate, key] = sections[..] else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "credentials are two certificates and a private key",
            ));
        };
        let owned = |section: &str| format!("{}\n", section.trim());
        let found = Credentials { authority: owned(authority), certificate: owned(certificate), key: owned(key) };
        found.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
        Ok(found)
    }

    /// As they go through a pipe: secret.
    pub fn text(&self) -> String {
        [&self.authority, &self.certificate, &self.key].map(|section| format!("{}\n", section.trim())).concat()
    }

    /// TLS of a worker's end.
    pub(super) fn client_config(&self) -> Result<Arc<ClientConfig>, ControlError> {
        let (roots, chain, key) = self.parse()?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(certificates)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(certificates)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }

    fn parse(&self) -> Result<(RootCertStore, Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), ControlError> {
        let certificate = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).map_err(certificates);
        let mut roots = RootCertStore::empty();
        roots.add(certificate(&self.authority)?).map_err(certificates)?;
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).map_err(certificates)?;
        Ok((roots, vec![certificate(&self.certificate)?], key))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(secret)")
    }
}

/// The name under which a worker knows the driver, whatever its address.
pub(super) fn driver_name() -> ServerName<'static> {
    ServerName::try_from(DRIVER).expect("a DNS name")
}

/// Whether a certificate of this run lets its holder claim `rank`.
pub(super) fn allows_rank(certificate: &CertificateDer<'_>, rank: u32) -> bool {
    let Ok(parsed) = ParsedCertificate::try_from(certificate) else { return false };
    [Scope::Rank(rank), Scope::AnyRank]
        .into_iter()
        .any(|scope| ServerName::try_from(name(scope)).is_ok_and(|name| verify_server_name(&parsed, &name).is_ok()))
}

fn name(scope: Scope) -> String {
    match scope {
        Scope::Driver => DRIVER.into(),
        Scope::Rank(rank) => format!("rank-{rank}.worker.echelon"),
        Scope::AnyRank => ANY_RANK.into(),
    }
}

/// Named, since two providers in one build leave rustls without a default.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificates(error: impl fmt::Display) -> ControlError {
    ControlError::Certificates(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(credentials: &Credentials) -> CertificateDer<'static> {
        credentials.parse().unwrap().1.remove(0)
    }

    #[test]
    fn a_certificate_is_for_its_rank() {
        let authority = RunAuthority::new().unwrap();
        let (three, any) = (authority.worker(Some(3)).unwrap(), authority.worker(None).unwrap());
        assert!(allows_rank(&leaf(&three), 3) && !allows_rank(&leaf(&three), 4) && !allows_rank(&leaf(&three), 33));
        assert!(allows_rank(&leaf(&any), 0) && allows_rank(&leaf(&any), u32::MAX));
    }

    #[test]
    fn credentials_pass_through_a_file_of_the_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("join.pem");
        let credentials = RunAuthority::new().unwrap().worker(None).unwrap();
        credentials.write(&path).unwrap();
        credentials.write(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Credentials::read(&path).unwrap(), credentials);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = Credentials::read(&path).unwrap_err().to_string();
        assert!(error.contains("mode 640") && error.contains("chmod 600"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no partial file stays");
    }

    #[test]
    fn credentials_pass_through_a_pipe_that_stays_open() {
        let credentials = RunAuthority::new().unwrap().worker(Some(0)).unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(credentials.text().as_bytes()).unwrap();
        assert_eq!(Credentials::receive(reader).unwrap(), credentials);
        drop(writer);
        assert_eq!(format!("{credentials:?}"), "Credentials(secret)");
    }

    #[test]
    fn other_text_is_refused() {
        let text = RunAuthority::new().unwrap().worker(None).unwrap().text();
        let half = &text[..text.len() / 2];
        assert!(Credentials::receive(half.as_bytes()).unwrap_err().to_string().contains("before the private key"));
        let spoiled = text.replacen("MII", "!!!", 1);
        assert!(Credentials::receive(spoiled.as_bytes()).is_err());
        let endless = io::repeat(b'x');
        assert!(Credentials::receive(endless).is_err());
    }
}
