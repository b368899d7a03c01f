//! Exports and the NBD server.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Context, Outcome};
use crate::export::nbd::{
    BitmapReference, InetAddress, NbdExportSpec, NbdServerOptions, ServerAddress,
};
use crate::export::{Export, ExportSpec, ExportStatus, ExportType, RemoveMode};
use crate::nbd::MAX_STRING_LENGTH;
use crate::qmp::error::QmpError;
use crate::qmp::schema::Args;

/// Clients at a time where nothing else is said.
const MAX_CONNECTIONS: u32 = 100;

/// Seconds for a handshake where nothing else is said.
const HANDSHAKE_SECONDS: u32 = 10;

/// `block-export-add` and `--export`.
pub(super) async fn add(context: &Context, args: Args<'_>) -> Outcome {
    let common = ExportSpec {
        id: args.required_str("id").into(),
        node_name: args.required_str("node-name").into(),
        writable: args.bool("writable").unwrap_or(false),
    };
    context.exports.check(&common)?;
    if let Some(iothread) = args.str("iothread") {
        context.objects.check_iothread(iothread)?;
    }
    match args.required_str("type") {
        "nbd" => {
            let text = |name| args.str(name).map(str::to_owned);
            let spec = NbdExportSpec {
                common,
                name: text("name"),
                description: text("description"),
                bitmaps: bitmaps(args.array("bitmaps").unwrap_or_default()),
                allocation_depth: args.bool("allocation-depth").unwrap_or(false),
                writethrough: args.bool("writethrough").unwrap_or(false),
            };
            add_nbd(context, spec)
        }
        "ublk" => add_ublk(context, common, args).await,
        other => unreachable!("the schema has no export type '{other}'"),
    }
}

#[cfg(feature = "ublk")]
async fn add_ublk(context: &Context, common: ExportSpec, args: Args<'_>) -> Outcome {
    use crate::export::ublk::{UblkExport, UblkOptions, ZeroCopy};
    if args.bool("writethrough") == Some(true) {
        let text = "Parameter 'writethrough' is not supported for exports of type 'ublk'";
        return Err(QmpError::generic(text));
    }
    let defaults = UblkOptions::default();
    let options = UblkOptions {
        device_id: args.u32("device-id"),
        queues: args.u16("queues").unwrap_or(defaults.queues),
        queue_depth: args.u16("queue-depth").unwrap_or(defaults.queue_depth),
        zero_copy: match args.str("zero-copy") {
            Some("on") => ZeroCopy::On,
            Some("off") => ZeroCopy::Off,
            _ => ZeroCopy::Auto,
        },
        logical_block_size: logical_block_size(args)?,
    };
    UblkExport::start(&context.exports, &common, &options).await?;
    Ok(json!({}))
}

#[cfg(feature = "ublk")]
fn logical_block_size(args: Args<'_>) -> Result<Option<u32>, QmpError> {
    match args.u64("logical-block-size") {
        None => Ok(None),
        Some(512) => Ok(Some(512)),
        Some(4096) => Ok(Some(4096)),
        Some(other) => Err(QmpError::generic(format!(
            "Parameter 'logical-block-size' must be 512 or 4096, not {other}"
        ))),
    }
}

#[cfg(not(feature = "ublk"))]
async fn add_ublk(_context: &Context, _common: ExportSpec, _args: Args<'_>) -> Outcome {
    Err(QmpError::generic("liveblk was built without ublk exports"))
}

/// Each by its name, or by its node's name and its own.
fn bitmaps(references: &[Value]) -> Vec<BitmapReference> {
    let reference = |value: &Value| match value {
        Value::String(name) => BitmapReference {
            node: None,
            name: name.clone(),
        },
        other => BitmapReference {
            node: Some(Args::new(other).required_str("node").into()),
            name: Args::new(other).required_str("name").into(),
        },
    };
    references.iter().map(reference).collect()
}

fn add_nbd(context: &Context, spec: NbdExportSpec) -> Outcome {
    if !context.nbd.is_running() {
        return Err(QmpError::generic("NBD server not running"));
    }
    context.nbd.add(spec)?;
    Ok(json!({}))
}

/// `block-export-del`.
pub(super) async fn remove(context: &Context, args: Args<'_>) -> Outcome {
    let id = args.required_str("id");
    context.exports.remove(id, remove_mode(args)).await?;
    Ok(json!({}))
}

fn remove_mode(args: Args<'_>) -> RemoveMode {
    match args.str("mode") {
        Some("hard") => RemoveMode::Hard,
        _ => RemoveMode::Safe,
    }
}

/// `query-block-exports`.
pub(super) fn query(context: &Context) -> Outcome {
    Ok(context.exports.list().iter().map(export_info).collect())
}

fn export_info(status: &ExportStatus) -> Value {
    let export = &*status.export;
    let mut info = json!({
        "id": export.id(),
        "type": export.export_type().name(),
        "node-name": export.root().node().name(),
        "shutting-down": status.shutting_down,
    });
    if let (Some(info), Some(Value::Object(more))) = (info.as_object_mut(), ublk_info(export)) {
        info.extend(more);
    }
    info
}

#[cfg(feature = "ublk")]
fn ublk_info(export: &dyn Export) -> Option<Value> {
    let export: &crate::export::ublk::UblkExport = export.as_any().downcast_ref()?;
    Some(json!({
        "device": export.device_path().to_string_lossy(),
        "device-id": export.device_id(),
        "zero-copy": export.is_zero_copy(),
        "queues": export.queues(),
        "queue-depth": export.queue_depth(),
        "logical-block-size": export.logical_block_size(),
    }))
}

#[cfg(not(feature = "ublk"))]
fn ublk_info(_export: &dyn Export) -> Option<Value> {
    None
}

/// `nbd-server-start`, and `--nbd-server` with its flat address.
pub(super) async fn start_nbd_server(context: &Context, args: Args<'_>) -> Outcome {
    if context.nbd.is_running() {
        return Err(QmpError::generic("NBD server already running"));
    }
    if let Some(credentials) = args.str("tls-creds") {
        let text = format!("No TLS credentials with id '{credentials}'");
        return Err(QmpError::generic(text));
    }
    let Some(address) = args.object("addr") else {
        unreachable!("the schema makes 'addr' mandatory");
    };
    let seconds = args
        .u32("handshake-max-seconds")
        .unwrap_or(HANDSHAKE_SECONDS);
    let options = NbdServerOptions {
        address: server_address(address)?,
        max_connections: args.u32("max-connections").unwrap_or(MAX_CONNECTIONS),
        handshake_limit: (seconds > 0).then(|| Duration::from_secs(seconds.into())),
    };
    context.nbd.start(options).await?;
    Ok(json!({}))
}

/// The address proper is in `data`, or flat beside the type.
fn server_address(address: Args<'_>) -> Result<ServerAddress, QmpError> {
    let data = address.object("data").unwrap_or(address);
    match address.required_str("type") {
        "unix" => Ok(ServerAddress::Unix(data.required_str("path").into())),
        _ => inet_address(data).map(ServerAddress::Inet),
    }
}

fn inet_address(data: Args<'_>) -> Result<InetAddress, QmpError> {
    let (host, port) = (data.required_str("host"), data.required_str("port"));
    let number = port.parse().map_err(|_| {
        let reason = "Servname not supported for ai_socktype";
        QmpError::generic(format!(
            "address resolution failed for {host}:{port}: {reason}"
        ))
    })?;
    Ok(InetAddress {
        host: host.into(),
        port: number,
        to: data.u16("to"),
        ipv4: data.bool("ipv4"),
        ipv6: data.bool("ipv6"),
        numeric: data.bool("numeric").unwrap_or(false),
    })
}

/// `nbd-server-stop`.
pub(super) async fn stop_nbd_server(context: &Context) -> Outcome {
    context.nbd.stop().await?;
    Ok(json!({}))
}

/// `nbd-server-add`, the old way: the id is the name, and a read-only node is exported read-only.
pub(super) fn add_to_nbd_server(context: &Context, args: Args<'_>) -> Outcome {
    let device = args.required_str("device");
    let Some(node) = context.graph.find(device) else {
        let text = format!("Cannot find device='{device}' nor node-name='{device}'");
        return Err(QmpError::generic(text));
    };
    let name = args.str("name").unwrap_or(device);
    let description = args.str("description");
    check_length("export name", name)?;
    check_length("description", description.unwrap_or_default())?;
    let common = ExportSpec {
        id: name.into(),
        node_name: device.into(),
        writable: args.bool("writable").unwrap_or(false) && !node.options().read_only,
    };
    context.exports.check(&common)?;
    let bitmap = args.str("bitmap").map(|name| BitmapReference {
        node: None,
        name: name.into(),
    });
    let spec = NbdExportSpec {
        common,
        name: Some(name.into()),
        description: description.map(str::to_owned),
        bitmaps: bitmap.into_iter().collect(),
        allocation_depth: false,
        writethrough: false,
    };
    add_nbd(context, spec)
}

fn check_length(what: &str, text: &str) -> Result<(), QmpError> {
    match text.len() > MAX_STRING_LENGTH {
        true => Err(QmpError::generic(format!("{what} '{text}' too long"))),
        false => Ok(()),
    }
}

/// `nbd-server-remove`.
pub(super) async fn remove_from_nbd_server(context: &Context, args: Args<'_>) -> Outcome {
    let name = args.required_str("name");
    let found = context.exports.find(name);
    if found.is_some_and(|status| status.export.export_type() != ExportType::Nbd) {
        let text = format!("Block export '{name}' is not an NBD export");
        return Err(QmpError::generic(text));
    }
    context.exports.remove(name, remove_mode(args)).await?;
    Ok(json!({}))
}
