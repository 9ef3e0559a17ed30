//! Networks of instances: an address, a way to the host and beyond it, and no way to each other.
//!
//! ```text
//!  guest eth0 ═ worker ═ TAP ov1a2b-…  ┐
//!  10.100.7.3             10.100.0.1   │ routes, one     packet filter
//!                                      ├─ each ──────── ovum-1a2b ──── uplink, masqueraded
//!  guest eth0 ═ worker ═ TAP ov1a2b-…  │
//!  10.100.9.8             10.100.0.1   ┘ bridge ovum-1a2b: the gateway's address and no port
//! ```
//!
//! Each guest is alone on its link: the gateway's address is at the host's end of all of them, and
//! a route of its own leads to each guest. So what guests say on their links, in ARP or of whatever
//! address, reaches no other, and the host's routes are what a packet's source is checked against
//! ([`rules`]). Nothing of one guest outlives its worker, which holds the only file of the TAP:
//! with the file goes the interface, and with that its addresses, routes and neighbours.
//!
//! What is the same for all guests is set up when a server starts, in place of whatever an earlier
//! one left under the same names; these come from the data folder, so that several servers can
//! share a host. A host that cannot have networks still runs instances without.

use std::error::Error;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::OnceCell;
use tokio::task::{spawn, spawn_blocking};

use crate::causes::chain;
use crate::os::netlink::{Message, Netlink};
use crate::os::tap;
use crate::os::tool::ToolError;
use crate::subnet::Subnet;
use addresses::Addresses;
use host::Names;
use probe::Prober;

pub use addresses::{Lease, Mac};
pub use probe::HttpProbe;

mod addresses;
pub mod forwarding;
mod host;
mod probe;
pub mod resolvers;
mod rules;

/// Packets that may wait for a guest, as many as an Ethernet card of the host has room for.
const PACKETS_WAITING: u32 = 1000;

/// At least so many may wait for one whose rate is limited; else those of this part of a second:
/// longer queues only make it slow to answer.
const PACKETS_WAITING_MIN: u32 = 32;
const WAITS_PER_SECOND: u64 = 20;

/// Bytes of a packet that fills an Ethernet frame.
const PACKET_BYTES: u64 = 1500;

/// How networks of a server shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkSpec {
    /// The addresses of guests.
    pub subnet: Subnet,
    /// Whom guests ask for names; nobody: whom the host asks.
    pub dns: Vec<Ipv4Addr>,
    /// The server's data folder, by which it is told from others.
    pub owner: PathBuf,
}

/// The networks of this server's instances. Clones are the same.
#[derive(Debug, Clone)]
pub struct Network {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// None if there are to be no networks.
    spec: Option<NetworkSpec>,
    names: Names,
    addresses: Addresses,
    /// Once the host is set up. Until that works each who needs it tries again.
    ready: OnceCell<()>,
    prober: Prober,
}

/// What a guest has to know to use its network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wiring {
    /// Its address.
    pub address: Ipv4Addr,
    /// How many bits of it the subnet has.
    pub prefix: u8,
    /// Where it sends what is for others.
    pub gateway: Ipv4Addr,
    /// Whom it asks for names.
    pub dns: Vec<Ipv4Addr>,
}

/// Bytes that went through an interface, as its guest sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// To the guest.
    pub received_bytes: u64,
    /// From the guest.
    pub sent_bytes: u64,
}

impl Network {
    /// Networks as `spec` says, or none at all. The host is made ready meanwhile: who needs a
    /// network waits for that, and tries again if it failed.
    pub fn open(spec: Option<NetworkSpec>) -> Self {
        let network = Self::new(spec);
        if network.is_on() {
            let network = network.clone();
            spawn(async move {
                if let Err(error) = network.prepare().await {
                    let error = chain(&error);
                    tracing::warn!(error, "Instances have no network until this is mended");
                }
            });
        }
        network
    }

    fn new(spec: Option<NetworkSpec>) -> Self {
        let owner = spec.as_ref().map_or(Path::new(""), |spec| &spec.owner);
        let names = Names::of(owner);
        // Nobody is ever given an address where there are no networks.
        let subnet = spec.as_ref().map_or(Subnet::DEFAULT, |spec| spec.subnet);
        let addresses = Addresses::new(subnet);
        let (ready, prober) = (OnceCell::new(), Prober::default());
        Self { shared: Arc::new(Shared { spec, names, addresses, ready, prober }) }
    }

    /// Whether there are to be networks here.
    pub fn is_on(&self) -> bool {
        self.shared.spec.is_some()
    }

    /// The addresses of guests, if there are to be any.
    pub fn subnet(&self) -> Option<Subnet> {
        self.shared.spec.as_ref().map(|spec| spec.subnet)
    }

    /// Sets the host up, unless that was done.
    ///
    /// # Errors
    ///
    /// [`NetworkError`]; what was set up stays, and is set up anew by the next attempt.
    pub async fn prepare(&self) -> Result<(), NetworkError> {
        let set_up = async || {
            let shared = Arc::clone(&self.shared);
            let spec = shared.spec.clone().ok_or(NetworkError::Off)?;
            let work = move || host::set_up(&shared.names, &spec);
            spawn_blocking(work).await.map_err(|error| NetworkError::host("set up", error))?
        };
        self.shared.ready.get_or_try_init(set_up).await.copied()
    }

    /// An address for a guest that had `last`, or none yet.
    ///
    /// # Errors
    ///
    /// [`NetworkError::Exhausted`], [`NetworkError::Off`].
    pub fn lease(&self, last: Option<Ipv4Addr>) -> Result<Lease, NetworkError> {
        let spec = self.shared.spec.as_ref().ok_or(NetworkError::Off)?;
        self.shared.addresses.lease(last).ok_or(NetworkError::Exhausted {
            subnet: spec.subnet,
            guests: self.shared.addresses.count(),
        })
    }

    /// The lease of a guest that runs already.
    pub fn hold(&self, address: Ipv4Addr) -> Lease {
        if self.subnet().is_none_or(|subnet| !subnet.contains(address)) {
            tracing::warn!(%address, "A guest has an address of a subnet that was: it is cut off");
        }
        self.shared.addresses.hold(address)
    }

    /// What the guest with `lease` is told.
    pub fn wiring(&self, lease: &Lease) -> Wiring {
        let spec = self.shared.spec.as_ref();
        let subnet = spec.map_or(Subnet::DEFAULT, |spec| spec.subnet);
        Wiring {
            address: lease.address(),
            prefix: subnet.prefix(),
            gateway: subnet.gateway(),
            dns: spec.map(|spec| name_servers(&spec.dns)).unwrap_or_default(),
        }
    }

    /// Makes the TAP of the instance `id`, and the route to its guest. Returns the TAP's files, one
    /// for each queue; it is there as long as one of them is open. The slower the guest is given
    /// what comes, the less of it may wait.
    ///
    /// # Errors
    ///
    /// [`NetworkError`]; nothing is left.
    pub async fn connect(
        &self,
        lease: &Lease,
        id: &str,
        (queues, download_bps): (usize, Option<NonZeroU64>),
    ) -> Result<Vec<OwnedFd>, NetworkError> {
        self.prepare().await?;
        let Wiring { address, gateway, .. } = self.wiring(lease);
        let name = self.shared.names.tap(id);
        let waiting = packets_waiting(download_bps);
        let work = move || plug(&name, (gateway, address), queues, waiting);
        spawn_blocking(work).await.map_err(|error| NetworkError::host("make a TAP", error))?
    }

    /// What has passed through the TAP of the instance `id`; nothing if it has none.
    pub fn traffic(&self, id: &str) -> Traffic {
        let folder = Path::new("/sys/class/net").join(self.shared.names.tap(id));
        let count = |name: &str| {
            let text = fs::read_to_string(folder.join("statistics").join(name));
            text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or_default()
        };
        // What the host's end sends is what the guest receives.
        Traffic { received_bytes: count("tx_bytes"), sent_bytes: count("rx_bytes") }
    }

    /// By what guests' services are asked whether they are well.
    pub fn prober(&self) -> &Prober {
        &self.shared.prober
    }

    /// Takes back what was set up, unless guests still use it.
    pub async fn close(&self) {
        if self.shared.ready.get().is_none() {
            return;
        }
        let names = self.shared.names.clone();
        match spawn_blocking(move || host::tear_down(&names)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "Failed to take back the network"),
            Err(error) => tracing::warn!(%error, "Failed to take back the network"),
        }
    }
}

/// Whether guests of the server with the data folder `owner` can have the addresses of `subnet`.
///
/// # Errors
///
/// [`NetworkError::Collision`]; [`NetworkError::Host`] if the host's routes cannot be read.
pub fn check(subnet: Subnet, owner: &Path) -> Result<(), NetworkError> {
    host::check_routes(&Names::of(owner), subnet)
}

/// Whom a guest asks that boots now: `chosen`, or whom the host asks at this moment, which changes
/// with the network it is in.
fn name_servers(chosen: &[Ipv4Addr]) -> Vec<Ipv4Addr> {
    if !chosen.is_empty() {
        return chosen.to_vec();
    }
    let host = resolvers::of_host(Path::new("/"));
    host.map_or_else(|| vec![resolvers::FALLBACK], |resolvers| resolvers.servers)
}

/// A TAP called `name`, with the gateway at this end and the guest at the other.
fn plug(
    name: &str,
    (gateway, guest): (Ipv4Addr, Ipv4Addr),
    queues: usize,
    packets_waiting: u32,
) -> Result<Vec<OwnedFd>, NetworkError> {
    let files = tap::create(name, queues).map_err(|source| NetworkError::Tap { source })?;
    let configure = || {
        let netlink = Netlink::open()?;
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let index = netlink.index(name)?.ok_or_else(missing)?;
        // A kernel without IPv6 has no such setting, and needs none.
        let _ = netlink.change([Message::without_ipv6_address(index)]);
        netlink.change([
            Message::set_up(index, Mac::of(gateway).octets(), packets_waiting),
            Message::add_peer(index, gateway, guest),
            Message::add_neighbour(index, guest, Mac::of(guest).octets()),
        ])
    };
    configure().map_err(|source| NetworkError::host("configure a TAP", source))?;
    Ok(files)
}

fn packets_waiting(download_bps: Option<NonZeroU64>) -> u32 {
    let Some(bps) = download_bps else { return PACKETS_WAITING };
    let packets = bps.get() / WAITS_PER_SECOND / PACKET_BYTES;
    let packets = u32::try_from(packets).unwrap_or(PACKETS_WAITING);
    packets.clamp(PACKETS_WAITING_MIN, PACKETS_WAITING)
}

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There are to be none.
    #[error("This server has no networks: start it without `--network false`")]
    Off,
    /// All addresses are taken.
    #[error(
        "All {guests} addresses of {subnet} are in use: stop instances, or give the server a \
         larger --subnet"
    )]
    Exhausted {
        /// Of which subnet.
        subnet: Subnet,
        /// By so many.
        guests: usize,
    },
    /// Other routes of the host lead there.
    #[error(
        "Subnet {subnet} overlaps with the host's route to {route}: give the server another \
         with --subnet"
    )]
    Collision {
        /// The subnet of guests.
        subnet: Subnet,
        /// Where the route leads, and by what.
        route: String,
    },
    /// Something else goes by our name.
    #[error(
        "Interface {name} is not this server's: remove it (`ip link delete {name}`), or use \
         another --data-dir"
    )]
    Foreign {
        /// Of which interface.
        name: String,
    },
    /// Not for this user.
    #[error(
        "This server may not set up networks: it needs CAP_NET_ADMIN, so run it as root; \
         instances with network.enabled false need nothing"
    )]
    Denied,
    /// No TAP.
    #[error(
        "Failed to make a TAP at {}: load the module (`modprobe tun`), and let this user open it",
        tap::DEVICE
    )]
    Tap {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No packet filter.
    #[error("Failed to set the packet filter")]
    Filter(#[source] ToolError),
    /// The kernel refuses.
    #[error("Failed to {what}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl NetworkError {
    fn host(what: &'static str, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Host { what, source: io::Error::other(error) }
    }
}
