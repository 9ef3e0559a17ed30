//! Files into a guest and out of it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time;

use crate::cases;
use ovum_test_host::{BUSYBOX, Frame, Server, Socket, TestHost};

cases![
    a_file_goes_in_and_comes_out,
    a_mode_and_an_owner_go_with_a_file,
    a_tree_comes_out_whole,
    directories_and_links_go_in,
    a_large_sparse_file_stays_sparse,
    what_cannot_be_copied_is_refused,
    a_copy_that_is_given_up_harms_nothing,
    an_instance_is_deleted_during_copies,
    a_path_is_looked_up,
    how_long_many_small_files_take,
];

/// Entries of a tree by path: header and bytes.
type Tree = BTreeMap<String, (Value, Vec<u8>)>;

async fn put(server: &Server, name: &str, request: Value, chunks: &[&[u8]]) -> Value {
    let mut socket = server.socket(&format!("/instances/{name}/cp")).await;
    socket.say(&request.to_string()).await;
    for chunk in chunks {
        socket.send(chunk).await;
    }
    socket.say(r#"{"type":"end"}"#).await;
    let result = socket.json().await;
    assert_eq!(socket.next().await, Frame::Close(Some(1000)));
    result
}

async fn get(server: &Server, name: &str, path: &str, follow_links: bool) -> Tree {
    let mut socket = server.socket(&format!("/instances/{name}/cp")).await;
    let request = json!({ "direction": "from", "guest_path": path, "follow_links": follow_links });
    socket.say(&request.to_string()).await;
    let mut tree = Tree::new();
    loop {
        let header = socket.json().await;
        assert_eq!(header["type"], "header", "{header}");
        let (bytes, end) = file(&mut socket).await;
        assert_eq!(end["type"], "end", "{end}");
        assert_eq!(header["size"].as_u64(), u64::try_from(bytes.len()).ok(), "{header}");
        let path = header["path"].as_str().unwrap().to_owned();
        tree.insert(path, (header, bytes));
        if end["final"] == true {
            assert_eq!(socket.next().await, Frame::Close(Some(1000)));
            return tree;
        }
    }
}

/// The bytes of a file and the text behind them.
async fn file(socket: &mut Socket) -> (Vec<u8>, Value) {
    let mut bytes = Vec::new();
    loop {
        match socket.next().await {
            Frame::Binary(chunk) => bytes.extend(chunk),
            Frame::Text(text) => return (bytes, serde_json::from_str(&text).unwrap()),
            Frame::Close(code) => panic!("closed with {code:?}"),
        }
    }
}

fn to(path: &str) -> Value {
    json!({ "direction": "to", "guest_path": path, "is_dir": false, "mode": 420 })
}

async fn a_file_goes_in_and_comes_out(host: &TestHost) {
    let server = &host.server;
    server.start_idle("files", BUSYBOX).await;
    let content: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let chunks: Vec<&[u8]> = content.chunks(32 << 10).collect();

    let result = put(server, "files", to("/new/folder/file"), &chunks).await;
    let empty = put(server, "files", to("/new/empty"), &[]).await;
    let replaced = put(server, "files", to("/new/empty"), &[b"no more"]).await;
    let tree = get(server, "files", "/new/folder/file", false).await;
    let sum = server.sh("files", "cat /new/empty; stat -c %a /new/folder /new/empty").await;

    let expected = json!({ "type": "result", "success": true, "bytes_written": 3_000_000 });
    assert_eq!(result, expected);
    assert_eq!(empty, json!({ "type": "result", "success": true }));
    assert_eq!(replaced["bytes_written"], 7);
    let (header, bytes) = &tree["file"];
    assert!(tree.len() == 1 && *bytes == content, "it came out as it went in");
    assert_eq!((&header["mode"], &header["is_dir"]), (&json!(420), &json!(false)));
    assert_eq!(sum.text(), "no more755\n644\n");
    server.delete("files").await;
}

async fn a_mode_and_an_owner_go_with_a_file(host: &TestHost) {
    let server = &host.server;
    server.start_idle("owners", BUSYBOX).await;
    let request = json!({
        "direction": "to", "guest_path": "/tmp/owned", "mode": 0o4751, "uid": 1000, "gid": 0,
        "mtime": 1_600_000_000,
    });

    put(server, "owners", request, &[b"x"]).await;
    let seen = server.sh("owners", "stat -c '%a %u %g %Y' /tmp/owned").await;
    let (header, _) = &get(server, "owners", "/tmp/owned", false).await["owned"];

    assert_eq!(seen.text(), "4751 1000 0 1600000000\n");
    assert_eq!(header["mode"], 0o751, "clients take no more");
    assert_eq!((&header["uid"], &header["mtime"]), (&json!(1000), &json!(1_600_000_000)));
    server.delete("owners").await;
}

async fn a_tree_comes_out_whole(host: &TestHost) {
    let server = &host.server;
    server.start_idle("tree", BUSYBOX).await;
    let script = "mkdir -p /top/a/b /top/empty && cd /top && echo text > a/b/file && \
                  ln -s a/b/file link && ln -s . circle && ln -s /bin/busybox away && \
                  mkfifo pipe && chmod 700 a && : > a/nothing";
    assert_eq!(server.sh("tree", script).await.code, 0);

    let tree = get(server, "tree", "/top", false).await;
    let followed = get(server, "tree", "/top", true).await;

    let paths: Vec<_> = tree.keys().map(String::as_str).collect();
    assert_eq!(
        paths,
        [
            "top",
            "top/a",
            "top/a/b",
            "top/a/b/file",
            "top/a/nothing",
            "top/away",
            "top/circle",
            "top/empty",
            "top/link"
        ]
    );
    assert_eq!(tree["top/a/b/file"].1, b"text\n");
    assert_eq!(tree["top/a"].0["mode"], 0o700);
    let (link, _) = &tree["top/link"];
    assert_eq!((&link["is_symlink"], &link["link_target"]), (&json!(true), &json!("a/b/file")));
    assert_eq!(followed["top/link"].1, b"text\n");
    assert_eq!(followed["top/circle"].0["is_symlink"], true);
    assert!(followed["top/away"].1.starts_with(b"\x7fELF"));
    server.delete("tree").await;
}

async fn directories_and_links_go_in(host: &TestHost) {
    let server = &host.server;
    server.start_idle("dirs", BUSYBOX).await;
    let directory =
        json!({ "direction": "to", "guest_path": "/d/e", "is_dir": true, "mode": 0o711 });
    let link = json!({ "direction": "to", "guest_path": "/d/l", "link_target": "e" });

    for _ in 0..2 {
        let result = put(server, "dirs", directory.clone(), &[]).await;
        assert_eq!(result, json!({ "type": "result", "success": true }));
        assert_eq!(put(server, "dirs", link.clone(), &[]).await["success"], true);
    }
    let seen = server.sh("dirs", "stat -c '%F %a' /d/e; readlink /d/l").await;

    assert_eq!(seen.text(), "directory 711\ne\n");
    server.delete("dirs").await;
}

async fn a_large_sparse_file_stays_sparse(host: &TestHost) {
    let server = &host.server;
    server.start_idle("sparse", BUSYBOX).await;
    let zeroes = vec![0; 32 << 10];
    let chunks: Vec<&[u8]> = [b"head".as_slice()]
        .into_iter()
        .chain((0..1024).map(|_| zeroes.as_slice()))
        .chain([b"tail".as_slice()])
        .collect();
    let size = 8 + (32 << 20);

    let started = Instant::now();
    let result = put(server, "sparse", to("/sparse"), &chunks).await;
    let up = started.elapsed();
    let seen = server.sh("sparse", "stat -c %s /sparse; du -k /sparse; tail -c 4 /sparse").await;
    let started = Instant::now();
    let tree = get(server, "sparse", "/sparse", false).await;
    let down = started.elapsed();

    assert_eq!(result["bytes_written"], size);
    let lines: Vec<_> = seen.text().split_whitespace().collect();
    assert_eq!((lines[0], lines[3]), (size.to_string().as_str(), "tail"));
    assert!(lines[1].parse::<u64>().unwrap() < 1024, "{seen:?}");
    let bytes = &tree["sparse"].1;
    assert!(bytes.starts_with(b"head\0") && bytes.ends_with(b"\0tail"));
    let rate = |took: Duration| f64::from(size) / 1e6 / took.as_secs_f64();
    println!("cp: {:.1} MB/s in, {:.1} MB/s out", rate(up), rate(down));
    server.delete("sparse").await;
}

async fn what_cannot_be_copied_is_refused(host: &TestHost) {
    let server = &host.server;
    server.start_idle("refuse", BUSYBOX).await;

    let over = put(server, "refuse", to("/bin"), &[b"x"]).await;
    assert_eq!((&over["success"], &over["error"]), (&json!(false), &json!("/bin: is a directory")));
    let directory = json!({ "direction": "to", "guest_path": "/bin/busybox", "is_dir": true });
    let over = put(server, "refuse", directory, &[]).await;
    assert_eq!(over["error"], "/bin/busybox: is a file");
    let device = put(server, "refuse", to("/dev/null"), &[b"x"]).await;
    assert_eq!(device["error"], "/dev/null: is not a regular file");
    // What cannot be stored is read all the same, and the answer arrives.
    let full = put(server, "refuse", to("/proc/version"), &[&[b'x'; 1 << 20]]).await;
    assert_eq!(full["success"], false, "{full}");

    for (request, part) in [
        (json!({ "direction": "from", "guest_path": "/nowhere" }), "/nowhere: No such file"),
        (json!({ "direction": "from", "guest_path": "/dev/null" }), "neither a file"),
        (json!({ "direction": "up", "guest_path": "/" }), "invalid JSON: unknown variant"),
        (json!({ "direction": "to", "guest_path": "" }), "guest_path is empty"),
        (json!({ "direction": "to", "guest_path": "/a", "mode": 4096 }), "mode is 4096"),
        (json!([]), "invalid JSON"),
    ] {
        let mut socket = server.socket("/instances/refuse/cp").await;
        socket.say(&request.to_string()).await;
        let answer = socket.json().await;
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(answer["type"] == "error" && message.contains(part), "{request}: {answer}");
        assert!(matches!(socket.next().await, Frame::Close(_)));
    }
    server.delete("refuse").await;
}

async fn a_copy_that_is_given_up_harms_nothing(host: &TestHost) {
    let server = &host.server;
    server.start_idle("given-up", BUSYBOX).await;
    let mut socket = server.socket("/instances/given-up/cp").await;
    socket.say(&to("/part").to_string()).await;
    socket.send(b"some").await;
    drop(socket);
    let mut socket = server.socket("/instances/given-up/cp").await;
    socket.say(r#"{"direction":"from","guest_path":"/bin/busybox"}"#).await;
    socket.json().await;
    drop(socket);

    let deadline = Instant::now() + Duration::from_secs(30);
    while server.sh("given-up", "cat /part").await.text() != "some" {
        assert!(Instant::now() < deadline, "it never got there");
        time::sleep(Duration::from_millis(50)).await;
    }
    let tree = get(server, "given-up", "/part", false).await;
    assert_eq!(tree["part"].1, b"some", "what came stays");
    server.delete("given-up").await;
}

/// Copies in both directions are under way, neither of which ends by itself.
async fn an_instance_is_deleted_during_copies(host: &TestHost) {
    let server = &host.server;
    server.start_idle("copied", BUSYBOX).await;
    let large = server.sh("copied", "dd if=/dev/zero of=/large bs=1M count=64").await;
    assert_eq!(large.code, 0, "{}", large.text());
    let mut into = server.socket("/instances/copied/cp").await;
    into.say(&to("/part").to_string()).await;
    into.send(b"some").await;
    let mut out = server.socket("/instances/copied/cp").await;
    out.say(r#"{"direction":"from","guest_path":"/large"}"#).await;
    out.json().await;

    let began = Instant::now();
    server.delete("copied").await;
    assert_eq!(into.json().await["success"], false);
    while !matches!(out.next().await, Frame::Close(_)) {}

    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

async fn a_path_is_looked_up(host: &TestHost) {
    let server = &host.server;
    server.start_idle("stat", BUSYBOX).await;
    server.sh("stat", "mkdir /d; chmod 711 /d; echo hello > /d/f; ln -s f /d/l").await;
    let stat = async |query: &str| server.get(&format!("/instances/stat/stat?{query}")).await;

    let file = json!({
        "exists": true, "is_dir": false, "is_file": true, "is_symlink": false, "mode": 420,
        "size": 6,
    });
    assert_eq!(stat("path=/d/f").await, file);
    assert_eq!(stat("path=/d/l&follow_links=true").await, file);
    let link = stat("path=%2Fd%2Fl").await;
    assert_eq!((&link["is_symlink"], &link["link_target"]), (&json!(true), &json!("f")));
    let directory = stat("path=/d").await;
    assert_eq!((&directory["is_dir"], &directory["mode"]), (&json!(true), &json!(0o711)));
    let missing = json!({
        "exists": false, "is_dir": false, "is_file": false, "is_symlink": false, "mode": 0,
        "size": 0,
    });
    assert_eq!(stat("path=/nowhere/at/all").await, missing);
    let long = stat(&format!("path=/{}", "x".repeat(300))).await;
    assert!(long["error"].is_string() && long["exists"] == false, "{long}");

    let call = async |path: &str| server.call(Method::GET, path, None).await;
    let (status, _) = call("/instances/stat/stat").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let (status, _) = call("/instances/none/stat?path=/").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    server.delete("stat").await;
}

/// A connection for each, as the SDK does it, and all of them in one tree back.
async fn how_long_many_small_files_take(host: &TestHost) {
    const FILES: usize = 300;
    let server = &host.server;
    server.start_idle("small", BUSYBOX).await;

    let started = Instant::now();
    for number in 0..FILES {
        let path = format!("/small/{number}");
        let result = put(server, "small", to(&path), &[path.as_bytes()]).await;
        assert_eq!(result["success"], true);
    }
    let up = started.elapsed();
    let started = Instant::now();
    let tree = get(server, "small", "/small", false).await;
    let down = started.elapsed();

    assert_eq!(tree.len(), FILES + 1);
    assert_eq!(tree["small/7"].1, b"/small/7");
    let each = |took: Duration| took / u32::try_from(FILES).unwrap();
    println!("cp of {FILES} files: {:?} each in, {:?} each out", each(up), each(down));
    server.delete("small").await;
}
