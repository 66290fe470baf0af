#!/usr/bin/env bash
# Build the stub of CANN for the torch_npu that a Python finds: bash tests/ascend/build.sh FOLDER [PYTHON]
# Writes FOLDER/lib; FOLDER lies outside the repository's tracked files. Needs gcc and binutils. See README.md.
set -euo pipefail
folder=${1:?the folder to build in}
python=${2:-python3}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$folder/build" "$folder/lib"
cd "$folder"

# Neither is imported: torch_npu does not load before the stub exists.
where() { "$python" -c "import importlib.util as u, sys; print(u.find_spec('$1').submodule_search_locations[0])"; }
torch=$(where torch) npu=$(where torch_npu)
core=("$npu"/lib/*.so "$npu"/_C.*.so)

exported() { nm -D --defined-only "$@" | awk 'NF >= 2 {print $NF}' | sed 's/@.*//' | sort -u; }
# Unversioned undefined strong functions of torch_npu that neither torch nor torch_npu has: CANN's.
nm -D --undefined-only "${core[@]}" | awk '$1 == "U" {print $2}' | grep -v @ | sort -u > build/undefined
exported "$torch"/lib/*.so "${core[@]}" $(ldconfig -p | sed -n 's/.*=> \(.*\/lib\(c\|dl\|pthread\|rt\|m\)\.so\.[0-9]*\)$/\1/p') > build/present
rm -f build/*.o
for source in acl aclnn hccl; do gcc -O1 -fPIC -w -c "$here/$source.c" -o "build/$source.o"; done
nm --defined-only build/*.o | awk 'NF == 3 {print $3}' | sort -u > build/written
comm -23 build/undefined build/present | grep -vE '^_?Py' | comm -23 - build/written > build/default
awk '{print "long " $1 "(void) { return 107000; }"}' build/default > build/default.c
gcc -O1 -fPIC -w -shared -Wl,-soname,libcann_stub.so -o lib/libcann_stub.so build/*.o build/default.c
# One library under every name that torch_npu links to or opens.
for name in $(readelf -d "${core[@]}" | sed -n 's/.*NEEDED.*\[\(lib[a-z_]*\.so\)\]/\1/p' | sort -u) libopapi.so libhcomm.so; do
    [ -e "$npu/lib/$name" ] || [ -e "$torch/lib/$name" ] || ln -sf libcann_stub.so "lib/$name"
done
echo "$(wc -l < build/written) functions written, $(wc -l < build/default) fail, in $folder/lib"
