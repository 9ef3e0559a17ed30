//! The server behind `ovum run`: one that is there, or one in this process for as long as the
//! command takes.
//!
//! Several such commands share the server of the one that came first. When that ends the others
//! hear it, and one of them goes on as the server: guests never depended on either.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::time;

use super::ServerArgs;
use crate::client::{Client, own_token};
use crate::server::{InUse, Running, socket};

/// How long a server that holds the data folder may take to listen, or to let go of it.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(15);

/// Between two looks at a data folder that another server holds.
const HANDOVER_INTERVAL: Duration = Duration::from_millis(50);

/// A server that answers.
#[derive(Debug)]
pub(super) struct Reached {
    args: ServerArgs,
    client: Client,
    /// Ours, if there was none.
    embedded: Option<Running>,
}

impl Reached {
    /// The server that was named, or this host's, or one of our own.
    pub(super) async fn open(args: ServerArgs) -> anyhow::Result<Self> {
        let home = args.home.find()?;
        if let Some(client) = args.client_elsewhere(&home)? {
            return Ok(Self { args, client, embedded: None });
        }
        let mut config = args.home.clone().into_config()?;
        // Most often it has one guest, and the first of all only has work with that.
        config.shares_kernel = false;
        let socket = socket(&config.data_dir);
        let deadline = Instant::now() + HANDOVER_TIMEOUT;
        loop {
            match UnixStream::connect(&socket) {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    // Another user's server: it may have an open door elsewhere.
                    let client = args.client()?;
                    return Ok(Self { args, client, embedded: None });
                }
                Err(_nobody) => {}
                Ok(_knock) => {
                    let client = Client::at_socket(&socket, args.token(&home))?;
                    return Ok(Self { args, client, embedded: None });
                }
            }
            match Running::start(&config, &[]).await {
                Ok(running) => {
                    let client = Client::at_socket(&socket, Some(own_token(running.secret())))?;
                    return Ok(Self { args, client, embedded: Some(running) });
                }
                Err(error) if error.is::<InUse>() && Instant::now() < deadline => {
                    time::sleep(HANDOVER_INTERVAL).await;
                }
                Err(error) => {
                    return Err(error).context("No server runs here, and none of our own starts");
                }
            }
        }
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Whether the server ends with this process.
    pub(super) fn is_embedded(&self) -> bool {
        self.embedded.is_some()
    }

    /// Finds another server after this one went away; false if it was a certain one.
    pub(super) async fn find_another(&mut self) -> anyhow::Result<bool> {
        let home = self.args.home.find()?;
        if self.is_embedded() || self.args.client_elsewhere(&home)?.is_some() {
            return Ok(false);
        }
        *self = Self::open(self.args.clone()).await?;
        Ok(true)
    }

    /// Ends the server if it is ours.
    pub(super) async fn close(self) {
        if let Some(running) = self.embedded {
            running.close().await;
        }
    }
}
