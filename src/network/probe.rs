//! Asking a guest's services whether they are well, from its host.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::OnceLock;
use std::time::Duration;

use reqwest::redirect::Policy;
use reqwest::{Client, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::time;

use crate::causes::chain;

/// One GET.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpProbe {
    /// At which port.
    pub port: u16,
    /// Path and query, beginning with a slash.
    pub path: String,
    /// Over TLS, whoever signed the certificate: what is asked is whether the service is well.
    pub tls: bool,
    /// The only good answer.
    pub expected_status: u16,
}

/// Asks services.
#[derive(Debug, Default)]
pub struct Prober {
    /// Once it was needed: most servers check nothing this way.
    client: OnceLock<Client>,
}

/// Why a service is not well.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It said nothing in time.
    #[error("no answer within {} ms", after.as_millis())]
    TimedOut {
        /// For how long.
        after: Duration,
    },
    /// It cannot be spoken to.
    #[error("{what}")]
    Failed {
        /// How, with all causes.
        what: String,
    },
    /// It said something else.
    #[error("status {status}, {expected} expected")]
    Status {
        /// What it said.
        status: u16,
        /// What it should have said.
        expected: u16,
    },
}

impl Prober {
    /// Connects, and no more.
    ///
    /// # Errors
    ///
    /// [`ProbeError`].
    pub async fn connect(
        &self,
        guest: Ipv4Addr,
        port: u16,
        timeout: Duration,
    ) -> Result<(), ProbeError> {
        let address = SocketAddr::new(IpAddr::V4(guest), port);
        match time::timeout(timeout, TcpStream::connect(address)).await {
            Ok(Ok(_connected)) => Ok(()),
            Ok(Err(error)) => Err(ProbeError::Failed { what: chain(&error) }),
            Err(_elapsed) => Err(ProbeError::TimedOut { after: timeout }),
        }
    }

    /// Sends a GET and reads the status; where it leads elsewhere is not followed.
    ///
    /// # Errors
    ///
    /// [`ProbeError`].
    pub async fn get(
        &self,
        guest: Ipv4Addr,
        probe: &HttpProbe,
        timeout: Duration,
    ) -> Result<(), ProbeError> {
        let HttpProbe { port, path, tls, expected_status } = probe;
        let scheme = if *tls { "https" } else { "http" };
        let request = self.client()?.get(format!("{scheme}://{guest}:{port}{path}"));
        match time::timeout(timeout, request.send()).await {
            Ok(Ok(answer)) if answer.status().as_u16() == *expected_status => Ok(()),
            Ok(Ok(answer)) => {
                let status = StatusCode::as_u16(&answer.status());
                Err(ProbeError::Status { status, expected: *expected_status })
            }
            Ok(Err(error)) => Err(ProbeError::Failed { what: chain(&error.without_url()) }),
            Err(_elapsed) => Err(ProbeError::TimedOut { after: timeout }),
        }
    }

    fn client(&self) -> Result<&Client, ProbeError> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let client = Client::builder()
            .no_proxy()
            .redirect(Policy::none())
            .pool_max_idle_per_host(0)
            .tls_danger_accept_invalid_certs(true)
            .build()
            .map_err(|error| ProbeError::Failed { what: chain(&error) })?;
        Ok(self.client.get_or_init(|| client))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// tcpmux, which nobody offers.
    const UNUSED_PORT: u16 = 1;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// A service on loopback that says `answer` to whoever asks, once; its port.
    fn service(answer: &'static str) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let _ = client.read(&mut [0; 1024]);
            client.write_all(answer.as_bytes()).unwrap();
        });
        port
    }

    async fn get(port: u16, expected_status: u16) -> Result<(), String> {
        let probe = HttpProbe { port, path: "/well".to_owned(), tls: false, expected_status };
        let asked = Prober::default().get(Ipv4Addr::LOCALHOST, &probe, PATIENCE).await;
        asked.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn only_the_expected_status_is_well() {
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        let elsewhere = "HTTP/1.1 302 Found\r\nlocation: /ok\r\ncontent-length: 0\r\n\r\n";

        assert_eq!(get(service(ok), 200).await, Ok(()));
        assert_eq!(get(service(elsewhere), 302).await, Ok(()), "nobody follows it");
        let error = get(service(ok), 204).await.unwrap_err();
        assert_eq!(error, "status 200, 204 expected");
        assert!(get(service("no HTTP at all\r\n\r\n"), 200).await.is_err());
    }

    #[tokio::test]
    async fn a_port_that_nobody_listens_at_is_not_well_and_a_silent_one_is_late() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = silent.local_addr().unwrap().port();
        let prober = Prober::default();
        let brief = Duration::from_millis(100);
        let probe = HttpProbe { port, path: "/".to_owned(), tls: false, expected_status: 200 };

        let connected = prober.connect(Ipv4Addr::LOCALHOST, port, PATIENCE).await;
        let late = prober.get(Ipv4Addr::LOCALHOST, &probe, brief).await.unwrap_err();
        let refused = prober.connect(Ipv4Addr::LOCALHOST, UNUSED_PORT, PATIENCE).await.unwrap_err();

        assert!(connected.is_ok());
        assert_eq!(late.to_string(), "no answer within 100 ms");
        assert!(refused.to_string().contains("refused"), "{refused}");
    }
}
