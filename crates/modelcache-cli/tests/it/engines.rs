//! The examples of docs/engines.md: SageMaker, Triton, and models in an image under a real overlay.

use crate::common::*;
use modelcache_testkit::Content;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;

#[test]
fn sagemaker_finds_an_archive_or_a_prefix_in_its_folder() {
    let house = House::new();
    let files = [("model.json", Content::from("{}")), ("code/inference.py", Content::from("pass"))];
    for (path, content) in &files {
        house.write(&format!("m/{path}"), content.clone());
        house.s3.put(BUCKET, &format!("churn/{path}"), content.clone()).unwrap();
    }
    let tar = ["-czf", "model.tar.gz", "-C", "m", "."];
    assert!(Command::new("tar").args(tar).current_dir(house.path("")).status().unwrap().success());
    house.s3.put(BUCKET, "models/model.tar.gz", Content::on_disk(house.path("model.tar.gz")).unwrap()).unwrap();
    for (source, folder) in [("models/model.tar.gz", "ml/archive"), ("churn/", "ml/prefix")] {
        let source = format!("s3://{BUCKET}/{source}");
        let run = house.on_local("a").envs(house.s3.env());
        run.run(["get", "--extract", "auto", "--into", folder, &source]).ok();
        let mut found = files_below(&house.path(folder));
        found.retain(|path| path != &PathBuf::from(".modelcache.json"));
        assert_eq!(found, ["code/inference.py", "model.json"].map(PathBuf::from), "{source}");
        files.iter().for_each(|(path, content)| assert_same(&house.path(folder).join(path), content));
    }
}

#[test]
fn triton_runs_the_executables_of_a_repository() {
    let house = House::new();
    house.write("repository/resnet/config.pbtxt", "backend: \"python\"");
    house.write("repository/resnet/1/model.py", "pass");
    let stub = house.write("repository/resnet/triton_python_backend_stub", "#!/bin/sh\necho stub\n");
    fs::set_permissions(stub, fs::Permissions::from_mode(0o755)).unwrap();
    house.on("a").run(["put", "triton/resnet@7", house.path("repository").to_str().unwrap()]).ok();
    // From the remote, the executable bit arrives on another machine.
    let exec =
        ["exec", "triton/resnet@7", "--", "sh", "-c", "$0/resnet/triton_python_backend_stub; ls $0/resnet", "{}"];
    let listing = "stub\n1\nconfig.pbtxt\ntriton_python_backend_stub\n";
    assert_eq!(house.on("b").run(exec).ok().stdout, listing);
}

#[test]
fn nothing_of_an_image_is_copied_up_by_its_overlay() {
    if !can_mount() {
        return;
    }
    let house = House::new();
    let repo = house.hub.repo("org/model");
    repo.commit().file("config.json", "{}").generated("model.safetensors", 1, 9 * MIB).publish().unwrap();
    house.write("models.txt", "hf://org/model@main\n");
    // The image has the models, also as a Hugging Face cache. The container adds a writable layer.
    house.on_local("image/models").env("MODEL_CACHE_LAYOUT", "hub").run(["prewarm", "--file", "models.txt"]).ok();
    let image = files_below(&house.path("image"));
    house.hub.down(true);
    let script = format!(
        "mount -t tmpfs none layers; mkdir layers/upper layers/work overlay\n\
         mount -t overlay -o lowerdir=image,upperdir=layers/upper,workdir=layers/work overlay overlay\n\
         export MODEL_CACHE_DIR=$PWD/overlay/cache MODEL_CACHE_LOWER_DIR=$PWD/overlay/models\n\
         {BIN} get hf://org/model@main\n\
         cat $({BIN} get hf://org/model@main)/model.safetensors | wc -c\n\
         {BIN} ls > listed\n\
         find layers/upper -type f > up"
    );
    fs::create_dir(house.path("layers")).unwrap();
    let found = house.on_local("unused").script(&script, &[]).ok().stdout;
    let lines: Vec<&str> = found.lines().collect();
    assert!(lines[0].contains("/overlay/models/"), "the files of the image are used: {found}");
    assert_eq!(lines[1], (9 * MIB).to_string());
    let up = fs::read_to_string(house.path("up")).unwrap();
    assert!(up.lines().all(|path| path.starts_with("layers/upper/cache/")), "copied up: {up}");
    assert!(!up.contains("safetensors") && !up.is_empty(), "{up}");
    assert_eq!(files_below(&house.path("image")), image);
}
