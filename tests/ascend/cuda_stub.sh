#!/usr/bin/env bash
# Stand-ins for NVIDIA's libraries, so that a CUDA build of torch imports and computes on the CPU without them:
#   bash tests/ascend/cuda_stub.sh PYTHON FOLDER      then LD_LIBRARY_PATH=FOLDER, before import torch
# Every function that torch's libraries want from them exists under its version and returns 100, "no device". For x86-64
# PyPI's torch up to 2.9 is such a build, and an older torch_npu needs the torch of its number. Needs gcc and binutils.
set -euo pipefail
python=${1:?the Python that has torch} folder=${2:?the folder to build in}
torch=$("$python" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")
mkdir -p "$folder/build"
cd "$folder"

libraries=("$torch"/lib/*.so)
nm -D --undefined-only "${libraries[@]}" 2>/dev/null | awk '$1 == "U" || $1 == "w" {print $2}' | sort -u > build/undefined
nm -D --defined-only "${libraries[@]}" 2>/dev/null | awk 'NF >= 3 {print $3}' | sed 's/@.*//' | sort -u > build/present
for library in "${libraries[@]}"; do
    readelf -d "$library" 2>/dev/null | sed -n 's/.*NEEDED.*\[\(lib\(cu\|nccl\|nv\)[^]]*\)\]/\1/p'
done | sort -u > build/wanted

# prefix LIBRARY: how the names of its functions without a version begin.
prefix() {
    case $1 in
        libcudart*) echo '^(cuda|__cuda)' ;;
        libcufile*) echo '^cuFile' ;;
        libcusparseLt*) echo '^cusparseLt' ;;
        libnccl*) echo '^nccl' ;;
        libcupti*) echo '^cupti' ;;
        libcurand*) echo '^curand' ;;
        libcusolver*) echo '^cusolver' ;;
        *) echo '^NOTHING' ;;
    esac
}

function_of() {
    case $1 in
        __cudaRegisterFatBinary) echo "void *$1(void *x) { return handle; }" ;;
        *GetErrorString | *GetErrorName | *GetStatusString | *GetStatusName | *getResultString | ncclGetLastError)
            echo "const char *$1() { return \"no device\"; }" ;;
        *) echo "long $1() { return 100; }" ;;
    esac
}

while read -r name; do
    version=$name
    case $name in libnvshmem*) version=NVSHMEM ;; esac
    sed -n "s/@@*${version//./\\.}\$//p" build/undefined | sort -u > build/versioned
    grep -v @ build/undefined | grep -E "$(prefix "$name")" | comm -23 - build/present > build/plain || true
    {
        echo 'static void *handle[4];'
        sort -u build/versioned build/plain | while read -r function; do function_of "$function"; done
    } > build/stub.c
    printf '%s {\nglobal: *;\n};\n' "$version" > build/map
    versions=()
    [ -s build/versioned ] && versions=(-Wl,--version-script=build/map)
    gcc -O0 -w -fPIC -shared -Wl,-soname,"$name" "${versions[@]}" -o "$name" build/stub.c
done < build/wanted
echo "$(wc -l < build/wanted) stand-ins for NVIDIA's libraries in $folder"
