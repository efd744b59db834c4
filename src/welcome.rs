//! What a person reads when the gateway starts, and the key that the first start makes.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// The variable that gives a key with every scope.
pub(crate) const KEY_VARIABLE: &str = "MOORLINE_API_KEY";
const KEY_FILE: &str = "api-key";

/// The key that every request may carry.
pub(crate) struct ApiKey {
    pub(crate) key: String,
    origin: Origin,
}

enum Origin {
    Environment,
    /// Made by this start.
    Made(PathBuf),
    File(PathBuf),
}

/// Takes the key from the environment, else from the data directory, else makes one.
pub(crate) fn api_key(data_dir: &Path) -> anyhow::Result<ApiKey> {
    if let Some(known) = known_api_key(data_dir)? {
        return Ok(known);
    }
    let path = data_dir.join(KEY_FILE);
    let key = make_key()?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    writeln!(file, "{key}").and_then(|()| file.sync_all())?;
    Ok(ApiKey {
        key,
        origin: Origin::Made(path),
    })
}

/// The key of the environment, else that of the data directory.
pub(crate) fn known_api_key(data_dir: &Path) -> anyhow::Result<Option<ApiKey>> {
    if let Ok(key) = std::env::var(KEY_VARIABLE) {
        anyhow::ensure!(
            key.len() >= 8 && key.bytes().all(|byte| byte.is_ascii_graphic()),
            "{KEY_VARIABLE} must have at least 8 visible ASCII characters and no spaces"
        );
        return Ok(Some(ApiKey {
            key,
            origin: Origin::Environment,
        }));
    }
    let path = data_dir.join(KEY_FILE);
    match fs::read_to_string(&path) {
        Ok(text) => {
            let key = text.trim().to_owned();
            anyhow::ensure!(
                !key.is_empty(),
                "{} is empty: delete it to have a new key made",
                path.display()
            );
            Ok(Some(ApiKey {
                key,
                origin: Origin::File(path),
            }))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// 128 random bits.
fn make_key() -> anyhow::Result<String> {
    let mut random = [0u8; 16];
    let mut source = fs::File::open("/dev/urandom").context("cannot open /dev/urandom")?;
    std::io::Read::read_exact(&mut source, &mut random).context("cannot read /dev/urandom")?;
    let mut key = String::from("mk_");
    for byte in random {
        write!(key, "{byte:02x}").expect("writing to memory");
    }
    Ok(key)
}

/// Where everything listens.
pub(crate) struct Addresses {
    pub(crate) devices: Vec<Listening>,
    /// For the other services.
    pub(crate) internal: Option<SocketAddr>,
    pub(crate) http: SocketAddr,
}

/// One listener for devices.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Listening {
    /// `mqtt`, `mqtts`, `ws` or `wss`.
    pub(crate) scheme: &'static str,
    pub(crate) address: SocketAddr,
}

/// The lines that scripts wait for.
pub(crate) fn lines(addresses: &Addresses) -> String {
    let mut text = String::new();
    for Listening { scheme, address } in &addresses.devices {
        writeln!(text, "listening {scheme} {address}").expect("writing to memory");
    }
    writeln!(text, "listening http {}", addresses.http).expect("writing to memory");
    if let Some(internal) = addresses.internal {
        writeln!(text, "listening internal {internal}").expect("writing to memory");
    }
    text.push_str("ready\n");
    text
}

/// The lines that scripts wait for, then those for a person.
pub(crate) fn text(addresses: &Addresses, data_dir: &Path, key: &ApiKey) -> String {
    let Addresses { devices, http, .. } = addresses;
    let mut text = lines(addresses);
    let in_file = match &key.origin {
        Origin::Environment => format!("the API key is that of {KEY_VARIABLE}"),
        Origin::File(path) => format!("the API key is in {}", path.display()),
        Origin::Made(path) => format!(
            "API key: {}  (made now, kept in {})",
            key.key,
            path.display()
        ),
    };
    let read_key = match &key.origin {
        Origin::Environment => format!("${KEY_VARIABLE}"),
        Origin::File(path) | Origin::Made(path) => format!("$(cat '{}')", absolute(path)),
    };
    let program = std::env::current_exe()
        .map_or_else(|_| "moorline".to_owned(), |path| path.display().to_string());
    write!(text, "\ndata in {}; {in_file}\n", absolute(data_dir)).expect("writing to memory");
    // The device on the terminal speaks plain MQTT.
    if let Some(Listening { address: mqtt, .. }) =
        devices.iter().find(|device| device.scheme == "mqtt")
    {
        write!(
            text,
            "see a push arrive: paste these three lines into another terminal\n\n\
             {program} device phone-1 --mqtt {mqtt} &\n\
             sleep 1; curl -sS http://{http}/v1/push -H \"Authorization: Bearer {read_key}\" -d '{{\"to\": {{\"client\": \"phone-1\"}}, \"payload\": \"hello\"}}'\n\
             sleep 1; echo; kill %1\n\n",
        )
        .expect("writing to memory");
    }
    text
}

fn absolute(path: &Path) -> String {
    fs::canonicalize(path)
        .unwrap_or_else(|_| path.to_owned())
        .display()
        .to_string()
}
