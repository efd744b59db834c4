//! Which server to connect to: the configured one, or the one that the sentinels say is the master.

use std::time::Duration;

use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ProtocolVersion, TlsCertificates,
};

/// Knows where a server is, and how it is spoken to.
pub(super) struct Finder {
    place: Place,
    dial: Dial,
}

enum Place {
    Fixed(ConnectionInfo),
    Sentinels {
        sentinels: Vec<ConnectionInfo>,
        master_name: String,
        /// How to speak to the master: all but where it is.
        master: ConnectionInfo,
    },
}

/// How any server is spoken to.
#[derive(Clone)]
pub(super) struct Dial {
    /// Trusted instead of what the system trusts.
    pub(super) authorities: Option<Vec<u8>>,
    pub(super) connect_timeout: Duration,
}

impl Dial {
    /// A client of one server.
    pub(super) fn client(&self, info: ConnectionInfo) -> Result<Client, String> {
        let tcp = info.tcp_settings().clone().set_nodelay(true);
        let info = info.set_tcp_settings(tcp);
        let client = match (&self.authorities, info.addr()) {
            (Some(authorities), ConnectionAddr::TcpTls { .. }) => Client::build_with_tls(
                info,
                TlsCertificates {
                    client_tls: None,
                    root_cert: Some(authorities.clone()),
                },
            ),
            _ => Client::open(info),
        };
        client.map_err(|error| error.to_string())
    }

    /// Asks a server one thing over a connection of its own.
    pub(super) async fn ask<T: redis::FromRedisValue>(
        &self,
        info: &ConnectionInfo,
        question: &redis::Cmd,
    ) -> Result<T, String> {
        let text = |error: redis::RedisError| error.to_string();
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.connect_timeout))
            .set_response_timeout(Some(self.connect_timeout));
        let client = self.client(info.clone())?;
        let opening = client.get_multiplexed_async_connection_with_config(&config);
        let mut connection = Box::pin(opening).await.map_err(text)?;
        question.query_async(&mut connection).await.map_err(text)
    }
}

/// The same server, elsewhere.
pub(super) fn at(info: &ConnectionInfo, host: &str, port: u16) -> ConnectionInfo {
    let host = host.to_owned();
    let addr = match info.addr() {
        ConnectionAddr::TcpTls {
            insecure,
            tls_params,
            ..
        } => ConnectionAddr::TcpTls {
            host,
            port,
            insecure: *insecure,
            tls_params: tls_params.clone(),
        },
        _ => ConnectionAddr::Tcp(host, port),
    };
    info.clone().set_addr(addr)
}

impl Finder {
    /// A server that stays where it is.
    pub(super) fn fixed(info: ConnectionInfo, dial: Dial) -> Self {
        Self {
            place: Place::Fixed(info),
            dial,
        }
    }

    /// The master `master_name`; `master` says how to speak to it.
    pub(super) fn sentinels(
        sentinels: Vec<ConnectionInfo>,
        master_name: String,
        master: ConnectionInfo,
        dial: Dial,
    ) -> Self {
        Self {
            place: Place::Sentinels {
                sentinels,
                master_name,
                master,
            },
            dial,
        }
    }

    /// A client of what [`Self::find`] found.
    pub(super) fn client(&self, info: ConnectionInfo) -> Result<Client, String> {
        // Only in version 3 of the protocol a lost connection is told of while nothing is asked.
        let settings = info
            .redis_settings()
            .clone()
            .set_protocol(ProtocolVersion::RESP3);
        self.dial.client(info.set_redis_settings(settings))
    }

    /// Where the server is now.
    pub(super) async fn find(&self) -> Result<ConnectionInfo, String> {
        match &self.place {
            Place::Fixed(info) => Ok(info.clone()),
            Place::Sentinels {
                sentinels,
                master_name,
                master,
            } => {
                let mut question = redis::cmd("SENTINEL");
                question.arg("get-master-addr-by-name").arg(master_name);
                let mut why = "no sentinel is configured".to_owned();
                for sentinel in sentinels {
                    match self.dial.ask(sentinel, &question).await {
                        Ok(Some((host, port))) => {
                            let (host, port): (String, u16) = (host, port);
                            return Ok(at(master, &host, port));
                        }
                        Ok(None) => why = format!("the sentinels know no master {master_name:?}"),
                        Err(error) => why = format!("no sentinel answers: {error}"),
                    }
                }
                Err(why)
            }
        }
    }
}
