//! One file, folder or link into an instance: one connection.

use std::pin::pin;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::Guest;
use crate::client::websocket::Said;

/// Makes what `request` says. A file's bytes come from `next`, piece by piece until there are no
/// more; returns how many there were.
pub(super) async fn put(
    guest: &Guest,
    request: &Value,
    mut next: impl AsyncFnMut() -> anyhow::Result<Option<Vec<u8>>>,
) -> anyhow::Result<u64> {
    let (mut sender, mut receiver) = guest.client.websocket(&format!("{}/cp", guest.route)).await?;
    let mut sending = pin!(async {
        sender.say(request.to_string()).await?;
        let mut bytes = 0;
        while let Some(chunk) = next().await? {
            bytes += u64::try_from(chunk.len())?;
            sender.send(chunk).await?;
        }
        sender.say(json!({ "type": "end" }).to_string()).await?;
        anyhow::Ok(bytes)
    });
    // A server that refuses says so before it has everything.
    let (bytes, said) = tokio::select! {
        biased;
        said = receiver.next() => (None, said?),
        bytes = &mut sending => (Some(bytes?), receiver.next().await?),
    };
    check(&said)?;
    bytes.context("The server answered before it had the file")
}

fn check(said: &Said) -> anyhow::Result<()> {
    let Said::Text(text) = said else { bail!("The server sent bytes for an answer") };
    let answer: Value = serde_json::from_str(text).context("The server sent no JSON")?;
    if answer["success"] == true {
        return Ok(());
    }
    let error = answer["error"].as_str().or(answer["message"].as_str());
    bail!("{}", error.unwrap_or("The server refused and did not say why"))
}
